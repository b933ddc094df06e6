"""Table 2 of the paper: seconds and peak memory of 5-way inference as shots grow, LA against dense affinities.

Each cell is measured in a fresh process, see `profile_cell`. LA takes its supports chunk by chunk and keeps
an embedding of each (support, class) pair; an affinity method compares the query with all support tokens of a class.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from rich.table import Table

from la.backbone.vit import identify_weights
from la.data.folds import FOLDS
from la.device import pick_device
from la.errors import InputError
from la.evaluation.baselines import BASELINES
from la.model.label_anything import preset
from pipelines.config import ProfileConfig
from pipelines.evaluation.profile_cell import SPLIT, WAYS, Cell, measure
from pipelines.remote_path import path_or_uri
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace, write_text

# shots -> GB, seconds on the paper's GPU with its ViT-B/16; DCAMA is the affinity method there
PAPER = {
    "affinity": {1: (6.72, 0.22), 2: (12.19, 0.30), 5: (28.0, 0.50), 10: (55.0, 1.02)},
    "la": {1: (0.57, 0.08), 2: (0.68, 0.10), 5: (0.99, 0.14), 10: (1.50, 0.21)},
}
PAPER_NAMES = {"affinity": "DCAMA", "la": "LA"}
MEMORY_BAR = 5.0  # affinity's memory over LA's, beyond the features
HYBRID_MEMORY, HYBRID_SECONDS = 1.5, 2.0  # at most, of the hybrid over LA


@dataclass(frozen=True)
class ProfileRow:
    """One cell: figures as in `profile_cell.Measured`, or None for all with a note that says why."""

    method: str
    shots: int
    backbone: bool
    device: str | None = None
    seconds: float | None = None
    drawn_shots: int | None = None
    ready_mb: float | None = None
    loaded_mb: float | None = None
    peak_mb: float | None = None
    episode_mb: float | None = None
    memory_from: str | None = None
    note: str = ""

    @property
    def with_episode_mb(self) -> float | None:
        """Peak beyond libraries and model."""
        return None if self.peak_mb is None else self.peak_mb - self.ready_mb

    @property
    def beyond_mb(self) -> float | None:
        """The same less the bytes of the episode's features, or photos: what the method itself takes."""
        return None if self.peak_mb is None else self.with_episode_mb - self.episode_mb


@dataclass(frozen=True)
class ProfileResult:
    """All rows, and the file they were written to."""

    rows: list[ProfileRow]
    file: Path

    def ratio(self, over: tuple[str, int], under: tuple[str, int]) -> float | None:
        """Memory beyond the features of one (method, shots) over another's; None where one was not measured."""
        found = {(row.method, row.shots): row.beyond_mb for row in self.rows if not row.backbone}
        above, below = found.get(over), found.get(under)
        return above / below if above and below and below > 0 else None

    def summary(self) -> list[str]:
        """What the table comes to: affinity over LA at the most shots, and LA's growth from the fewest."""
        shots = [row.shots for row in self.rows]
        few, most = min(shots), max(shots)
        lines = []
        if (ratio := self.ratio(("affinity", most), ("la", most))) is not None:
            verdict = "reached" if ratio >= MEMORY_BAR else "MISSED"
            lines.append(
                f"memory beyond the features at {most} shots, affinity over la: {ratio:.1f}, bar at least "
                f"{MEMORY_BAR:g}: {verdict}"
            )
        found = {(row.method, row.shots): row for row in self.rows if not row.backbone}
        la, hybrid = found.get(("la", most)), found.get(("hybrid", most))
        if la and hybrid and la.seconds and hybrid.seconds:
            for name, ratio, bar in (
                ("memory with the features", hybrid.with_episode_mb / la.with_episode_mb, HYBRID_MEMORY),
                ("seconds", hybrid.seconds / la.seconds, HYBRID_SECONDS),
            ):
                verdict = "kept" if ratio <= bar else "MISSED"
                lines.append(f"{name} at {most} shots, hybrid over la: {ratio:.2f}, bar at most {bar:g}: {verdict}")
        for method in dict.fromkeys(row.method for row in self.rows):
            growth = self.ratio((method, most), (method, few))
            if few < most and growth is not None:
                verdict = "less than linear" if growth < most / few else "NOT less than linear"
                lines.append(f"{method}: {growth:.2f} x the memory for {most / few:g} x the shots: {verdict}")
        return lines

    def table(self) -> Table:
        columns = ("method", "from", "shots", "seconds", "peak MB", "beyond input MB", "input MB")
        table = Table(*columns, "paper GB", "paper s", title=f"{WAYS}-way, memory beyond libraries and model")
        for row in self.rows:
            paper = PAPER.get(row.method, {}).get(row.shots)
            shown = ((row.seconds, 3), (row.with_episode_mb, 1), (row.beyond_mb, 1), (row.episode_mb, 1))
            figures = ["-" if value is None else f"{value:.{digits}f}" for value, digits in shown]
            theirs = (f"{PAPER_NAMES[row.method]} {paper[0]:.2f}", f"{paper[1]:.2f}") if paper else ("", "")
            table.add_row(row.method, "photos" if row.backbone else "features", str(row.shots), *figures, *theirs)
        return table

    def notes(self) -> list[str]:
        """Why cells are empty, each reason once."""
        return list(dict.fromkeys(row.note for row in self.rows if row.note))


def run_profile(config: ProfileConfig, on_row: Callable[[int, int, ProfileRow], None] | None = None) -> ProfileResult:
    """Measure every method at every number of shots, from features and, if asked for, from photos too.

    `on_row` gets (rows done, of all, the row). Rows that need photos or weights that are not there say so. Raises
    InputError for settings that cannot be used.
    """
    workspace, backbone = Workspace(config.workspace), config.from_photos
    shots, methods = sorted(config.shots), config.methods
    names = ("preset", "checkpoint", "weights", "fold", "repeats", "supports_at_once", "device", "threads")
    settings = {name: getattr(config, name) for name in names}
    cell = Cell(workspace.find_store(config.store), methods[0] if methods else "", 1, False, **settings)
    _check(cell, methods)
    missing = _missing_for_backbone(cell) if backbone else None
    cells = [
        replace(cell, method=method, shots=k, backbone=photos)
        for photos in ((False, True) if backbone else (False,))
        for method in methods
        for k in shots
    ]
    rows = []
    for each in cells:
        rows.append(_row(each, missing))
        if on_row:
            on_row(len(rows), len(cells), rows[-1])
    result = ProfileResult(rows, workspace.artifacts / "profile.json")
    written = [asdict(r) | {"with_episode_mb": r.with_episode_mb, "beyond_mb": r.beyond_mb} for r in rows]
    content = {
        "settings": {
            name: value for name, value in asdict(cell).items() if name not in ("method", "shots", "backbone")
        },
        "rows": written,
        "summary": result.summary(),
        "paper": PAPER,
    }
    write_text(result.file, json.dumps(content, indent=1, default=str) + "\n")
    return result


def _row(cell: Cell, missing: str | None) -> ProfileRow:
    row = ProfileRow(cell.method, cell.shots, cell.backbone)
    if cell.backbone and missing:
        return replace(row, note=missing)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            return replace(row, **asdict(executor.submit(measure, cell).result()))
    except BrokenProcessPool:
        return replace(
            row, note=f"{cell.method}, {cell.shots} shots: its process was killed, likely for want of memory"
        )
    except InputError as error:
        if not cell.backbone:
            raise
        return replace(row, note=f"from photos: {error}")
    except (RuntimeError, MemoryError) as error:  # such as a GPU's memory that does not suffice
        return replace(row, note=f"{cell.method}, {cell.shots} shots: {str(error).splitlines()[0]}")


def _check(cell: Cell, methods: Sequence[str]) -> None:
    unknown = [name for name in methods if name not in ("la", "hybrid", *BASELINES)]
    if unknown or not methods:
        raise InputError(
            f"--methods names {', '.join(unknown) or 'none'}; choose from la, hybrid, {', '.join(BASELINES)}."
        )
    if cell.fold not in range(FOLDS):
        raise InputError(f"--fold is {cell.fold}; expected 0 to {FOLDS - 1}.")
    if cell.checkpoint and not cell.checkpoint.exists():
        raise InputError(f"--checkpoint {cell.checkpoint} is not there. Pass a run's folder or its best.pt.")
    preset(cell.preset)
    pick_device(cell.device)


def _missing_for_backbone(cell: Cell) -> str | None:
    """Why photos cannot go through the store's backbone, and what to do; None where they can."""
    info = FeatureStore(cell.store).info
    folder = path_or_uri(info.coco_dir) / info.splits[SPLIT].name
    if not folder.is_dir():
        return f"from photos: {folder} is not there. Put the store's photos back there, or pass --no-from-photos."
    if cell.weights is None and not info.weights.startswith("hub:"):
        return (
            f"from photos: the store was made with a weights file of {info.weights[:19]}..., which it does not hold. "
            f"Pass --weights FILE, the weights of {info.backbone}, or --no-from-photos."
        )
    given = identify_weights(info.backbone, cell.weights)
    if given != info.weights:
        raise InputError(
            f"--weights {cell.weights} is {given[:19]}..., but the store was made with {info.weights[:19]}.... "
            "Pass the file that `featurize` was given."
        )
    return None
