"""The code that a run was trained by: its git commit, and a digest of the modules that decide a training's result."""

import ast
import functools
import hashlib
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel

ROOT = Path(__file__).parents[2]
DECIDING = (
    "la/schedules.py",
    "la/device.py",
    *(f"la/{folder}/*.py" for folder in ("data", "episodes", "model", "evaluation")),
    "pipelines/episodes/*.py",
    "pipelines/evaluation/evaluate.py",  # by its validations checkpoints are chosen
    "pipelines/evaluation/shared_work.py",
    *(f"pipelines/store/{module}.py" for module in ("annotations", "feature_shards", "reader")),
    *(f"pipelines/training/{m}.py" for m in ("fit_matching", "loop", "prepare", "resume", "state", "step_batches")),
)


class Code(BaseModel):
    """The code of one start of a run; `earlier` are the digests of starts before it that other code made."""

    digest: str
    commit: str | None  # with "-dirty" where files were changed since; None outside a git checkout
    python: str  # digests of two versions do not compare, as their syntax trees differ
    earlier: list[str] = []

    @property
    def digests(self) -> str:
        """Such as "1f0c2a9d", or "5b1e77a0+1f0c2a9d" of a run that went on under other code."""
        return "+".join([*self.earlier, self.digest])

    def differs_from(self, other: "Code") -> bool:
        return self.python == other.python and self.digest != other.digest

    def __str__(self) -> str:
        return f"commit {self.commit[:7]}, code {self.digest}" if self.commit else f"code {self.digest}"


@functools.cache
def code_now() -> Code:
    """The code of this process."""
    files = sorted({file for pattern in DECIDING for file in ROOT.glob(pattern)})
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Code(digest=digest_of_files(files, ROOT), commit=git_commit(), python=python)


def digest_of_files(files: list[Path], root: Path) -> str:
    """A digest of Python files and their paths below `root`; comments, docstrings and formatting do not count."""
    total = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if documented and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        total.update(f"{file.relative_to(root)}\n{ast.dump(tree)}\n".encode())
    return total.hexdigest()[:8]


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout that this file belongs to, with "-dirty" where tracked files were changed since."""
    try:
        for command in (("ls-files", "--error-unmatch", __file__), ("describe", "--always", "--dirty", "--abbrev=40")):
            asked = subprocess.run(
                ["git", "-C", str(ROOT), *command, *(["--exclude=*"] if command[0] == "describe" else [])],
                capture_output=True,
                text=True,
                check=True,
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip()
