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
    *(f"pipelines/store/{module}.py" for module in ("annotations", "feature_shards", "reader", "small_masks")),
    *(
        f"pipelines/training/{m}.py"
        for m in ("fit_matching", "loop", "optimiser", "prepare", "resume", "state", "step_batches")
    ),
)


class Code(BaseModel):
    """The code of one start of a run; `earlier` are the digests of starts before it that other code made."""

    digest: str
    commit: str  # see `git_sha`
    python: str  # digests of two versions do not compare, as their syntax trees differ
    earlier: list[str] = []

    @property
    def digests(self) -> str:
        """Such as "1f0c2a9d", or "5b1e77a0+1f0c2a9d" of a run that went on under other code."""
        return "+".join([*self.earlier, self.digest])

    def differs_from(self, other: "Code") -> bool:
        return self.python == other.python and self.digest != other.digest

    def __str__(self) -> str:
        return f"commit {self.commit[:7]} (code {self.digest})"


@functools.cache
def code_now() -> Code:
    """The code of this process."""
    files = sorted({file for pattern in DECIDING for file in ROOT.glob(pattern)})
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Code(digest=digest_of_files(files, ROOT), commit=git_sha(), python=python)


def digest_of_files(files: list[Path], root: Path) -> str:
    """A digest of Python files and their paths below `root`; comments, docstrings and formatting do not count."""
    total = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text())
        documented: list = [tree]
        for node in documented:
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
            documented += [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        total.update(f"{file.relative_to(root)}\n{ast.dump(tree)}\n".encode())
    return total.hexdigest()[:8]


@functools.cache
def git_sha() -> str:
    """Commit of the code that runs, with `-dirty` where it was changed since; `none` outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        # a checkout around an installed copy is that of another project
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        said = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run([*git, *said], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
