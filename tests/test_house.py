"""The structure of the project in numbers, which `python tests/test_house.py` prints, and the bounds they keep to."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRODUCT_LINES, TOOLS_LINES = 18_574, 2_500
MODULES_IN_A_FOLDER = 13
LINES_OF_A_FUNCTION = {"train_loop": 60}
LONGEST_FUNCTION = 80  # lines; those of commands/ are lists of options

PRODUCT = [
    ROOT / "cli.py",
    *(p for d in ("la", "pipelines", "sweeps", "commands") for p in sorted((ROOT / d).rglob("*.py"))),
]
TOOLS = sorted((ROOT / "tools").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph(paths: list[Path]) -> dict[str, set[str]]:
    """module -> the modules of the project that it imports: at its top, within functions, or for types alone."""
    names = {name_of(path) for path in paths}
    graph = {}
    for path in paths:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = path.parent.relative_to(ROOT).parts
                above = package[: len(package) - node.level + 1] if node.level else ()  # of `from .. import`
                source = ".".join((*above, *filter(None, [node.module])))
                below = {f"{source}.{alias.name}" for alias in node.names}
                imported |= below if below <= names else below | {source}
        graph[name_of(path)] = imported & names
    return graph


def circle_of(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some import circle; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return trail[trail.index(module) :]
        if module not in done:
            for other in sorted(graph[module]):
                if found := visit(other, [*trail, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def lines_of(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def modules_by_folder() -> Counter:
    return Counter(str(p.parent.relative_to(ROOT)) for p in PRODUCT if p.name not in ("__init__.py", "cli.py"))


def names_that_stand_twice() -> list[str]:
    counted = Counter(path.name for path in PRODUCT if path.name != "__init__.py")
    return sorted(name for name, times in counted.items() if times > 1)


def functions() -> dict[str, int]:
    """`file:function` -> its lines, without commands/."""
    return {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in PRODUCT
        if path.parent.name != "commands"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_the_product_keeps_to_its_lines():
    assert lines_of(PRODUCT) <= PRODUCT_LINES
    assert lines_of(TOOLS) <= TOOLS_LINES


def test_no_folder_is_full_and_no_file_name_stands_twice():
    assert max(modules_by_folder().values()) <= MODULES_IN_A_FOLDER
    assert not names_that_stand_twice()


def test_every_form_of_import_is_in_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr("test_house.ROOT", tmp_path)
    (tmp_path / "rooms" / "inner").mkdir(parents=True)
    modules = {
        "rooms/__init__.py": "",
        "rooms/a.py": "from rooms import b",
        "rooms/b.py": "from rooms import a, NUMBER",
        "rooms/c.py": "from . import a\ndef late():\n    from .b import x",
        "rooms/inner/d.py": "import rooms.a\nfrom ..c import late\nimport os",
        "rooms/inner/__init__.py": "if TYPE_CHECKING:\n    from rooms.b import x\n    from .d import y",
    }
    for file, text in modules.items():
        (tmp_path / file).write_text(text)
    assert import_graph([tmp_path / file for file in modules]) == {
        "rooms": set(),
        "rooms.a": {"rooms.b"},
        "rooms.b": {"rooms.a", "rooms"},
        "rooms.c": {"rooms.a", "rooms.b"},
        "rooms.inner.d": {"rooms.a", "rooms.c"},
        "rooms.inner": {"rooms.b", "rooms.inner.d"},
    }


def test_a_circle_is_found_where_there_is_one():
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle_of({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_runs_in_a_circle():
    assert not circle_of(import_graph(PRODUCT))


def test_no_function_is_too_long():
    for function, lines in functions().items():
        assert lines <= LINES_OF_A_FUNCTION.get(function.split(":")[1], LONGEST_FUNCTION), function


if __name__ == "__main__":
    fullest, modules = modules_by_folder().most_common(1)[0]
    longest = max(functions().items(), key=lambda item: item[1])
    print(f"product {lines_of(PRODUCT)} lines of at most {PRODUCT_LINES}; tools {lines_of(TOOLS)} of {TOOLS_LINES}")
    print(f"fullest folder {fullest}: {modules} modules; names that stand twice: {names_that_stand_twice() or 'none'}")
    print(f"import circle: {' -> '.join(circle_of(import_graph(PRODUCT))) or 'none'}; longest function {longest}")
