"""Checkpoints of a run: written whole, the last two and the best kept, a damaged one recognised and set aside.

last.pt            where the run goes on; it carries a copy of best.pt, from which that is restored
last.previous.pt   the one before, for when last.pt is damaged
last.new.pt        seen only after a kill between the renames that make it last.pt
best.pt            the best on seen classes: what evaluation takes

When they are read again: `pipelines.training.resume`.
"""

import errno
import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from la.errors import InputError
from pipelines.workspace import write_whole

NEW, LAST, PREVIOUS, BEST = "last.new.pt", "last.pt", "last.previous.pt", "best.pt"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's quota, the largest file allowed


class CheckpointWarning(UserWarning):
    """A damaged checkpoint that another one stands in for."""


class DamagedCheckpoint(InputError):
    """A checkpoint that is not what was written: cut short, or with changed bytes."""


def save(path: Path, content: dict) -> None:
    """Write a checkpoint of plain tensors and numbers; the old one stays until the new one is on the disk.

    Raises InputError where the disk is full.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename leaves an empty file under the good name

    with full_disk_told(path.parent):
        write_whole(path, write)


def save_last(run_dir: Path, content: dict) -> None:
    """Make `content` the run's last checkpoint and the last one the one before. Raises as `save` does."""
    save(run_dir / NEW, content)
    with suppress(FileNotFoundError):
        os.replace(run_dir / LAST, run_dir / PREVIOUS)
    os.replace(run_dir / NEW, run_dir / LAST)


def load(path: Path) -> dict:
    """A whole checkpoint, on the CPU, read once and held against the checksums within it, which torch.load ignores.

    Raises DamagedCheckpoint, and OSError where it is missing or a disk does not answer: then it may be whole.
    """
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:  # torch's own format: a zip with a CRC-32 of each part
            bad = parts.testzip()
        if not bad:
            return torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except Exception as error:  # changed bytes give errors of many kinds
        raise DamagedCheckpoint(f"{path} is cut short, damaged or not a checkpoint ({error}).") from error
    raise DamagedCheckpoint(f"{path} is damaged: {bad} in it does not have its checksum.")


def load_last(run_dir: Path) -> dict | None:
    """The newest whole checkpoint of a run. A damaged one is renamed *.damaged, with a warning."""
    for name in (NEW, LAST, PREVIOUS):
        path = run_dir / name
        try:
            return load(path)
        except FileNotFoundError:
            continue
        except DamagedCheckpoint as error:
            with suppress(FileNotFoundError):  # another worker was faster
                os.replace(path, path.with_suffix(".damaged"))
            warnings.warn(
                f"{error} It is kept as {path.stem}.damaged; training goes on from the checkpoint before, or from the "
                "start where there is none.",
                CheckpointWarning,
                stacklevel=2,
            )
    return None


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Tell of a full disk as the user's mistake, which it is to fix; other errors pass."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save wraps the system's error in one of its own
        cause = next((e for e in _chain(error) if isinstance(e, OSError) and e.errno in FULL), None)
        if cause is None:
            raise
        raise InputError(
            f"{folder}: {cause.strerror}, so nothing more can be written there; what was written before is intact. "
            "Free some space and run the same command again: it goes on from the last checkpoint."
        ) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
