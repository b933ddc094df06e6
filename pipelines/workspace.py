"""One folder that holds everything a study makes, so that later verbs find what earlier ones wrote."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from la.errors import InputError

T = TypeVar("T")


class Workspace:
    """`features/`, `episodes/`, `runs/`, `mlflow.db` and `artifacts/` under one root."""

    def __init__(self, root: Path | str):
        self.root = Path(root).absolute()

    @property
    def features(self) -> Path:
        return self.root / "features"

    @property
    def episodes(self) -> Path:
        return self.root / "episodes"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def mlflow_uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    def find_store(self, key: str | None = None) -> Path:
        """The folder of the complete feature store `key`, or of the only one.

        Raises InputError where there is none, or where there are several and none was named.
        """
        stores = {path.parent.name: path.parent for path in sorted(self.features.glob("*/store.json"))}
        if not stores:
            if begun := ", ".join(sorted({path.parents[1].name for path in self.features.glob("*/*/part-*.parquet")})):
                raise InputError(
                    f"--workspace {self.root} holds a feature store that is not finished, {begun}. Run the same "
                    "`featurize` again: it goes on where it was."
                )
            raise InputError(
                f"--workspace {self.root} holds no features. Run `python cli.py featurize --coco-dir DIR "
                f"--workspace {self.root}` first, or `python cli.py demo`."
            )
        if key is not None and key not in stores:
            raise InputError(f"--store {key} is not in {self.features}; found {', '.join(stores)}.")
        if key is None and len(stores) > 1:
            raise InputError(f"{self.features} holds several stores: {', '.join(stores)}. Choose one with --store.")
        return stores[key or next(iter(stores))]


def digest(value: object, length: int = 12) -> str:
    """Hex digest of a JSON-serialisable value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]


def write_whole(path: Path, write: Callable[[Path], T]) -> T:
    """Let `write` fill a temporary file beside `path`, then rename it, so that `path` is whole or absent."""
    temporary = temporary_beside(path)
    try:
        result = write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def temporary_beside(path: Path) -> Path:
    """A name in the folder of `path`, which is made, that no other process uses, on any machine that shares it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it when the process dies, however it dies.

    Where another process holds it: waits for it, or raises InputError; so too where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise InputError(
                f"{folder} is in use: a command that writes there is already running. Wait for it, or change a setting."
            ) from error
        except OSError as error:
            raise InputError(
                f"{folder} cannot be locked ({error.strerror}): expected a file system with locks, which keep two "
                "commands from writing there at once. Put the workspace, or what --out names, on another file system, "
                "or mount this one with locks."
            ) from error
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text))
