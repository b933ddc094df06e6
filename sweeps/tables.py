"""Tables 5 and 6 of the paper beside what a sweep measured."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import rich.table
from rich.console import Console
from rich.text import Text

from sweeps.ablations import PAPER_PROMPTS, PROMPT_TITLES, Task
from sweeps.trial import last_line

if TYPE_CHECKING:
    from sweeps.runner import SweepResult


@dataclass(frozen=True)
class Table:
    """A table to print, to save as CSV and to keep as text."""

    name: str  # of its files
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, caption=Text("\n".join(self.notes)), caption_justify="left")
        for number, column in enumerate(self.columns):
            # Each stands beside its measurement; the full title would not fit a terminal.
            title = "paper" if column.startswith("paper") else column
            table.add_column(title, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def text(self) -> str:
        console = Console(file=io.StringIO(), width=160, color_system=None)
        console.print(self.rich())
        return console.file.getvalue()


def ablation_tables(result: "SweepResult") -> list[Table]:
    """Table 5, configuration by task with mask prompts, and Table 6, prompt type by task of the complete model.

    A cell is the mean over folds in percent, with the sample deviation over folds or, of a single fold, over seeds.
    It says so where trials failed or have not run. A table the sweep was not asked to measure is left out.
    """
    config = result.config
    tasks = [(ways, shots) for ways in config.ways for shots in config.shots]
    folds = f"fold{'s' * (len(config.folds) > 1)} {', '.join(map(str, config.folds))}"
    measured = f"mIoU in % on unseen classes, {folds}, {config.seeds} x {config.episodes} episodes"
    if len(config.folds) > 1 or config.seeds > 1:
        measured += f", ± over {'folds' if len(config.folds) > 1 else 'seeds'}"
    failures = tuple(f"{name} failed: {last_line(reason)}" for name, reason in result.failed.items())
    tables = []
    if "mask" in config.prompts:
        paper = {v.name: v.paper for v in result.variants}
        rows = {v.name: (v.title, "mask") for v in result.variants}
        columns, cells = _cells(result, rows, tasks, paper)
        notes = (measured, "paper: COCO-20i, fold 0, 5 x 1000 episodes", *failures)
        tables.append(Table("table5", "Table 5: parts of the model", ("configuration", *columns), cells, notes))
    if any(v.name == "complete" for v in result.variants):
        rows = {prompt: (PROMPT_TITLES[prompt], prompt) for prompt in PROMPT_TITLES if prompt in config.prompts}
        columns, cells = _cells(result, rows, tasks, PAPER_PROMPTS, variant="complete")
        notes = (measured, "paper: COCO-20i, mean of four folds, 5 x 1000 episodes", *failures)
        tables.append(Table("table6", "Table 6: prompts at evaluation", ("prompts", *columns), cells, notes))
    return tables


def _cells(
    result: "SweepResult",
    rows: Mapping[str, tuple[str, str]],
    tasks: Sequence[Task],
    paper: Mapping[str, Mapping[Task, float]],
    variant: str | None = None,
) -> tuple[list[str], tuple[tuple[str, ...], ...]]:
    """Column titles and rows; `rows` maps a key of `paper`, the variant where none is given, to (title, prompt).

    The paper has a column only for tasks of which it prints a number.
    """
    printed = {task for key in rows for task in paper[key]}
    columns = []
    for ways, shots in tasks:
        columns.append(f"{ways}-way {shots}-shot")
        if (ways, shots) in printed:
            columns.append(f"paper {ways}-way {shots}-shot")
    cells = []
    for key, (title, prompt) in rows.items():
        row = [title]
        for task in tasks:
            row.append(_measured(result, variant or key, task, prompt))
            if task in printed:
                row.append(f"{paper[key][task]:.1f}" if task in paper[key] else "-")
        cells.append(tuple(row))
    return columns, tuple(cells)


def _measured(result: "SweepResult", variant: str, task: Task, prompt: str) -> str:
    folds = result.config.folds
    names = [f"{variant}/fold{fold}" for fold in folds]
    scores = [result.results[name].score(*task, prompt) for name in names if name in result.results]
    scores = [score for score in scores if score]
    failed = sum(name in result.failed for name in names)
    if not scores:
        return "failed" if failed else "not run"
    mean = statistics.fmean(score.miou for score in scores)
    cell = f"{mean:.1f}"
    if len(folds) == 1 and result.config.seeds > 1:
        cell += f" ± {scores[0].std:.1f}"
    elif len(scores) > 1:
        cell += f" ± {statistics.stdev(score.miou for score in scores):.1f}"
    return cell if len(scores) == len(folds) else f"{cell} ({len(scores)} of {len(folds)} folds)"
