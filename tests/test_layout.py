"""Dependencies point one way: cli -> commands -> sweeps -> pipelines -> la."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "la": {"pipelines", "sweeps", "commands", "cli", "ray", "mlflow", "pyarrow", "typer"},
    "pipelines": {"sweeps", "commands", "cli", "tools", "typer"},
    "sweeps": {"commands", "cli", "tools", "typer", "mlflow"},
    "commands": {"cli", "mlflow", "tools"},
}
FILES = [path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_place_allows(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    package = path.relative_to(ROOT).parts[0]
    assert not imported & FORBIDDEN[package]
    if package != "la" and "tracking" not in path.parts:
        assert "mlflow" not in imported, "only pipelines/tracking/ talks to MLflow"


WITHIN_LA = ("", "data", "backbone", "episodes", "model", "evaluation", "predictor")
JOBS = ("", "store", "episodes", "runs", "evaluation", "training", "tracking", "predict", "demo", "serve", "bench")


@pytest.mark.parametrize(("package", "order"), [("la", WITHIN_LA), ("pipelines", JOBS)])
def test_folders_import_those_before_them(package, order):
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).parts
        own = parts[0] if len(parts) > 1 else ""
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: a relative import hides which folder it reaches"
                modules = [f"{node.module}.{alias.name}" for alias in node.names]  # `from la import model` too
            for module in modules:
                top, _, rest = module.partition(".")
                if top == package and rest:
                    first = rest.split(".")[0]
                    other = first if (ROOT / package / first).is_dir() else ""
                    assert order.index(other) <= order.index(own), f"{path}:{node.lineno}: {module}"


def test_the_model_knows_no_command_line_and_nothing_above_it():
    for path in sorted((ROOT / "la").rglob("*.py")):
        texts = [
            n.value
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        flags = [text for text in texts if re.search(r"(?<![\w-])--[a-z]", text)]
        assert not flags, f"{path}: {flags}"
        above = [text for text in texts if re.search(r"\bpipelines\b", text)]
        assert not above, f"{path}: {above}"
