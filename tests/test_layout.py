"""Dependencies point one way: cli -> commands -> sweeps -> pipelines -> la."""

import ast
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
