"""The paper's tables beside what a sweep measured."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import rich.table
from rich.console import Console
from rich.text import Text

from sweeps.results import Score, SweepResult, last_line
from sweeps.study import Paper, Task, Variant, task_title

TOO_FEW = "too few images"
TableRow = tuple[str, str, str, Paper]  # title, variant, prompt, the paper's numbers


@dataclass(frozen=True)
class Table:
    """A table to print, to save as CSV and to keep as text."""

    name: str  # of its files
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def heads(self) -> list[str]:
        """Short titles of the columns: the paper's number and the difference stand beside their measurement."""
        words = ("paper", "difference")
        return [next((word for word in words if column.startswith(word)), column) for column in self.columns]

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, caption=Text("\n".join(self.notes)), caption_justify="left")
        # a terminal has no room for the differences
        visible = [number for number, head in enumerate(self.heads) if head != "difference"]
        for number in visible:
            table.add_column(self.heads[number], justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*(row[number] for number in visible))
        return table

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def text(self) -> str:
        console = Console(file=io.StringIO(), width=160, color_system=None)
        console.print(self.rich())
        return console.file.getvalue()


def of_variants(result: SweepResult, variants: Sequence[Variant]) -> SweepResult:
    """The result with only these of its variants."""
    return replace(result, variants=tuple(v for v in result.variants if v in variants))


def by_task(result: SweepResult, name: str, title: str, note: str, paper: bool = True) -> Table:
    """Variant by task, masks as prompts."""
    rows = [(v.title, v.name, "mask", v.paper if paper else {}) for v in result.variants]
    return task_table(result, name, title, rows, note)


def task_table(result: SweepResult, name: str, title: str, rows: Sequence[TableRow], note: str) -> Table:
    """Rows by task: the mean over folds in percent, with the deviation over folds or, of a single fold, over seeds.

    A cell says so where trials failed or have not run. The paper's numbers and the differences to them have columns
    only for tasks of which it prints one.
    """
    config = result.config
    tasks = [(ways, shots) for ways in config.ways for shots in config.shots]
    columns, cells = [], [[row[0]] for row in rows]
    for task in tasks:
        printed = [paper_number(row[3], task, config.folds) for row in rows]
        columns.append(task_title(*task))
        for cell, (_, variant, prompt, _) in zip(cells, rows, strict=True):
            cell.append(_measured(result, variant, task, prompt))
        if any(number is not None for number in printed):
            columns += [f"paper {task_title(*task)}", f"difference {task_title(*task)}"]
            for cell, (_, variant, prompt, _), number in zip(cells, rows, printed, strict=True):
                cell += _beside(mean_of(scores_of(result, variant, task, prompt)), number)
    spread = "folds" if len(config.folds) > 1 else "seeds"
    measured = _setting(result) + (f", ± over {spread}" if len(config.folds) > 1 or config.seeds > 1 else "")
    notes = (measured, note, *_failures(result))
    return Table(name, title, ("", *columns), tuple(map(tuple, cells)), notes)


def fold_table(result: SweepResult, name: str, task: Task) -> Table:
    """Variant by fold for one task, each with its 95 % interval, and the mean of the folds beside the paper's."""
    config = result.config
    number = 1 if task[0] == 1 else 3
    folds = [f"fold {fold}" for fold in config.folds]
    cells = []
    for variant in result.variants:
        by_fold = {fold: _score(result, variant.name, fold, task, "mask") for fold in config.folds}
        cell = [variant.title]
        cell += [_with_interval(s) if s else _why_not(result, variant.name, f) for f, s in by_fold.items()]
        scores = [score for score in by_fold.values() if score]
        mean = mean_of(scores)
        cell.append("-" if mean is None else f"{mean:.1f} ± {half_width(scores):.1f}")
        cells.append((*cell, *_beside(mean, paper_number(variant.paper, task, config.folds))))
    notes = (
        f"{_setting(result)}; [95 % of resampled episodes], of the mean as ±",
        "paper: COCO-20i, its rows for methods alike",
        *_failures(result),
    )
    columns = ("", *folds, "mean", "paper", "difference")
    return Table(name, f"Table {number}: {task_title(*task)}", columns, tuple(cells), notes)


def scores_of(result: SweepResult, variant: str, task: Task, prompt: str = "mask") -> list[Score]:
    """A variant's scores on one task, of the folds that are finished."""
    by_fold = [_score(result, variant, fold, task, prompt) for fold in result.config.folds]
    return [score for score in by_fold if score]


def mean_of(scores: Sequence[Score]) -> float | None:
    """mIoU in percent, mean over folds."""
    return statistics.fmean(score.miou for score in scores) if scores else None


def half_width(scores: Sequence[Score]) -> float:
    """Half of the 95 % interval of the mean over folds, whose episodes are independent."""
    return math.sqrt(sum(((s.interval[1] - s.interval[0]) / 2) ** 2 for s in scores)) / len(scores)


def paper_number(paper: Paper, task: Task, folds: Sequence[int]) -> float | None:
    """What the paper printed: the mean of these folds where it has each, else its mean of all."""
    number = paper.get(task)
    return statistics.fmean(number[fold] for fold in folds) if isinstance(number, tuple) else number


def _score(result: SweepResult, variant: str, fold: int, task: Task, prompt: str) -> Score | None:
    finished = result.results.get(f"{variant}/fold{fold}")
    return finished.score(*task, prompt) if finished else None


def _measured(result: SweepResult, variant: str, task: Task, prompt: str) -> str:
    folds = result.config.folds
    scores = scores_of(result, variant, task, prompt)
    if not scores:
        reasons = {_why_not(result, variant, fold) for fold in folds}
        return next((reason for reason in ("failed", "not run") if reason in reasons), TOO_FEW)
    cell = f"{mean_of(scores):.1f}"
    if len(folds) == 1 and result.config.seeds > 1:
        cell += f" ± {scores[0].std:.1f}"
    elif len(scores) > 1:
        cell += f" ± {statistics.stdev(score.miou for score in scores):.1f}"
    return cell if len(scores) == len(folds) else f"{cell} ({len(scores)} of {len(folds)} folds)"


def _with_interval(score: Score) -> str:
    return f"{score.miou:.1f} [{score.interval[0]:.1f}, {score.interval[1]:.1f}]"


def _why_not(result: SweepResult, variant: str, fold: int) -> str:
    name = f"{variant}/fold{fold}"
    return "failed" if name in result.failed else TOO_FEW if name in result.results else "not run"


def _beside(mean: float | None, number: float | None) -> tuple[str, str]:
    if number is None:
        return "-", "-"
    return f"{number:.1f}", "-" if mean is None else f"{mean - number:+.1f}"


def _setting(result: SweepResult) -> str:
    config = result.config
    folds = f"fold{'s' * (len(config.folds) > 1)} {', '.join(map(str, config.folds))}"
    episodes = f"{config.seeds} x {config.episodes} episodes"
    return f"mIoU in % on unseen classes, {folds}, protocol {config.protocol}, {episodes}"


def _failures(result: SweepResult) -> list[str]:
    return [f"{name} failed: {last_line(reason)}" for name, reason in result.failed.items()]
