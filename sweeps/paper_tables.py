"""The tables of a study: what its sweep measured, beside the paper's numbers and a baseline's."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import rich.table
from rich.console import Console
from rich.text import Text

from sweeps.results import Score, SweepResult, last_line
from sweeps.study import Paper, TableLayout, Task, Variant, task_title

TOO_FEW = "too few images"
PROMPT_TITLES = {"mask": "masks", "point_box": "boxes and points", "box": "boxes", "point": "points"}
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


def tables_of(result: SweepResult) -> list[Table]:
    """The tables that the study asks for, of variants that were run, and the differences to its baseline."""
    tables = []
    for layout in result.study.tables or (TableLayout(name=result.study.name, title=result.study.about),):
        known = [v for v in result.variants if layout.variants is None or v.name in layout.variants]
        if layout.kind == "folds":
            tasks = [(ways, shots) for ways in result.config.ways for shots in result.config.shots]
            tables += [fold_table(result, task) for task in tasks]
        elif layout.kind == "prompts" and known:
            tables.append(task_table(result, layout, _prompt_rows(result, layout, known)))
        elif known and "mask" in result.config.prompts:
            tables.append(task_table(result, layout, [(v.title, v.name, "mask", v.paper) for v in known]))
        elif known:
            prompt = result.config.prompts[0]
            tables.append(task_table(result, layout, [(v.title, v.name, prompt, {}) for v in known]))
    return [*tables, *difference_tables(result)]


def _prompt_rows(result: SweepResult, layout: TableLayout, variants: Sequence[Variant]) -> list[TableRow]:
    """A row for each kind of prompt; the paper's numbers are those of the first variant."""
    prompts = [prompt for prompt in PROMPT_TITLES if prompt in result.config.prompts]
    first = (layout.variants or (variants[0].name,))[0]
    return [
        (PROMPT_TITLES[p], v.name, p, layout.by_prompt.get(p, {}))
        if v.name == first
        else (f"{v.name}: {PROMPT_TITLES[p]}", v.name, p, {})
        for v in variants
        for p in prompts
    ]


def task_table(result: SweepResult, layout: TableLayout, rows: Sequence[TableRow]) -> Table:
    """Rows by task: the mean over folds in percent, with the deviation over seeds of training, folds or episode seeds.

    A cell says so where trials failed or have not run. The paper's numbers and the differences to them have columns
    only for tasks of which it prints one.
    """
    config = result.config
    columns, cells = [], [[row[0]] for row in rows]
    for task in ((ways, shots) for ways in config.ways for shots in config.shots):
        printed = [paper_number(row[3], task, config.folds) for row in rows]
        columns.append(task_title(*task))
        for cell, (_, variant, prompt, _) in zip(cells, rows, strict=True):
            cell.append(_measured(result, variant, task, prompt))
        if any(number is not None for number in printed):
            columns += [f"paper {task_title(*task)}", f"difference {task_title(*task)}"]
            for cell, (_, variant, prompt, _), number in zip(cells, rows, printed, strict=True):
                cell += _beside(mean_of(scores_of(result, variant, task, prompt)), number)
    seeds = (len(config.train_seeds), "seeds of training"), (len(config.folds), "folds"), (config.seeds, "seeds")
    spread = next((f", ± over {what}" for count, what in seeds if count > 1), "")
    notes = (_setting(result) + spread, *([layout.note] if layout.note else []), *_remarks(result))
    return Table(layout.name, layout.title, ("", *columns), tuple(map(tuple, cells)), notes)


def fold_table(result: SweepResult, task: Task) -> Table:
    """Variant by fold for one task, each with its 95 % interval, and the mean of the folds beside the paper's."""
    config = result.config
    number = 1 if task[0] == 1 else 3
    cells = []
    for variant in result.variants:
        by_fold = {fold: result.scores(variant.name, fold, *task, "mask") for fold in config.folds}
        cell = [variant.title]
        cell += [_with_interval(s) if s else _why_not(result, variant.name, f) for f, s in by_fold.items()]
        scores = [score for of_fold in by_fold.values() for score in of_fold]
        mean = mean_of(scores)
        cell.append("-" if mean is None else f"{mean:.1f} ± {half_width(scores):.1f}")
        cells.append((*cell, *_beside(mean, paper_number(variant.paper, task, config.folds))))
    notes = (
        f"{_setting(result)}; [95 % of resampled episodes], of the mean as ±",
        "paper: COCO-20i, its rows for methods alike",
        *_remarks(result),
    )
    columns = ("", *(f"fold {fold}" for fold in config.folds), "mean", "paper", "difference")
    name = f"table{number}-{task[0]}way-{task[1]}shot"
    return Table(name, f"Table {number}: {task_title(*task)}", columns, tuple(cells), notes)


def difference_tables(result: SweepResult) -> list[Table]:
    """Each variant less the study's baseline on the same episodes, [95 %]; none where the study names no baseline."""
    baseline = result.study.baseline_of(result.variants)
    others = [v for v in result.variants if v != baseline]
    if baseline is None or not others:
        return []
    config = result.config
    tasks = [(w, s, p) for p in config.prompts for w in config.ways for s in config.shots]
    rows = [(v.title, *(_difference(result, v.name, baseline.name, task) for task in tasks)) for v in others]
    titles = [task_title(w, s) + (f" {p}" if len(config.prompts) > 1 else "") for w, s, p in tasks]
    notes = (
        "points of mIoU, on the same episodes, folds and seeds of training; [95 % of resampled episodes and seeds]",
        "an interval that holds 0 shows no difference",
    )
    return [Table("differences", f"Less {baseline.title}", ("", *titles), tuple(rows), notes)]


def paired_difference(
    result: SweepResult, variant: str, baseline: str, task: tuple[int, int, str]
) -> tuple[float, float, float] | None:
    """(mean, low, high) of a variant's mIoU less another's in percent, 95 %, over the folds and seeds both have.

    Episodes are resampled by the same draws for both, seeds of training with them. None where there are no pairs.
    """
    random, of_folds = np.random.default_rng(0), []
    once = {v.name for v in result.variants if not v.trained}  # a method without training stands beside every seed
    for fold in result.config.folds:
        ours, theirs = (result.by_seed(name, fold, *task) for name in (variant, baseline))
        if variant in once:
            ours = dict.fromkeys(theirs, *ours.values()) if ours else {}
        elif baseline in once:
            theirs = dict.fromkeys(ours, *theirs.values()) if theirs else {}
        both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        pairs = [
            (a.miou - b.miou, np.subtract(a.resampled, b.resampled))
            for a, b in both
            if a.resampled and b.resampled and a.episodes_digest == b.episodes_digest
        ]
        if not pairs:
            return None
        draws = np.stack([draws for _, draws in pairs])
        chosen = random.integers(len(pairs), size=draws.shape)  # seeds of training, anew for every resample
        of_folds.append((statistics.fmean(d for d, _ in pairs), np.take_along_axis(draws, chosen, 0).mean(0)))
    low, high = np.quantile(np.mean([draws for _, draws in of_folds], axis=0), [0.025, 0.975])
    return statistics.fmean(mean for mean, _ in of_folds), float(low), float(high)


def _difference(result: SweepResult, variant: str, baseline: str, task: tuple[int, int, str]) -> str:
    paired = paired_difference(result, variant, baseline, task)
    return "-" if paired is None else f"{paired[0]:+.1f} [{paired[1]:+.1f}, {paired[2]:+.1f}]"


def scores_of(result: SweepResult, variant: str, task: Task, prompt: str = "mask") -> list[Score]:
    """A variant's scores on one task, of the folds and seeds of training that are finished."""
    return [score for fold in result.config.folds for score in result.scores(variant, fold, *task, prompt)]


def mean_of(scores: Sequence[Score]) -> float | None:
    """mIoU in percent, mean over folds and seeds of training."""
    return statistics.fmean(score.miou for score in scores) if scores else None


def half_width(scores: Sequence[Score]) -> float:
    """Half of the 95 % interval of the mean over folds, whose episodes are independent."""
    return math.sqrt(sum(((s.interval[1] - s.interval[0]) / 2) ** 2 for s in scores)) / len(scores)


def paper_number(paper: Paper, task: Task, folds: Sequence[int]) -> float | None:
    """What the paper printed: the mean of these folds where it has each, else its mean of all."""
    number = paper.get(task)
    return statistics.fmean(number[fold] for fold in folds) if isinstance(number, tuple) else number


def _measured(result: SweepResult, variant: str, task: Task, prompt: str) -> str:
    config = result.config
    by_fold = {fold: result.scores(variant, fold, *task, prompt) for fold in config.folds}
    scores = scores_of(result, variant, task, prompt)
    if not scores:
        reasons = {_why_not(result, variant, fold) for fold in config.folds}
        return next((reason for reason in ("failed", "not run") if reason in reasons), TOO_FEW)
    cell = f"{mean_of(scores):.1f}"
    of_seeds = list(zip(*by_fold.values(), strict=False))  # the scores of a seed of training on every fold
    if len(of_seeds) > 1:
        cell += f" ± {statistics.stdev(mean_of(of_seed) for of_seed in of_seeds):.1f}"
    elif len(config.train_seeds) > 1:
        pass  # of one seed there is no deviation over seeds, which is what the table's ± are
    elif len(scores) > 1:
        cell += f" ± {statistics.stdev(score.miou for score in scores):.1f}"
    elif len(config.folds) == 1 and config.seeds > 1:
        cell += f" ± {scores[0].std:.1f}"
    counts = [len(of_fold) for of_fold in by_fold.values()]  # seeds of training that are finished
    if 0 in counts:
        return f"{cell} ({len(counts) - counts.count(0)} of {len(counts)} folds)"
    return f"{cell} (seeds missing)" if max(counts) > 1 and min(counts) < len(config.train_seeds) else cell


def _with_interval(scores: Sequence[Score]) -> str:
    low, high = (statistics.fmean(score.interval[end] for score in scores) for end in (0, 1))
    return f"{mean_of(scores):.1f} [{low:.1f}, {high:.1f}]"


def _why_not(result: SweepResult, variant: str, fold: int) -> str:
    def ended(names: Iterable[str]) -> bool:
        return any(f"{name}/".startswith(f"{variant}/fold{fold}/") for name in names)

    return "failed" if ended(result.failed) else TOO_FEW if ended(result.results) else "not run"


def _beside(mean: float | None, number: float | None) -> tuple[str, str]:
    if number is None:
        return "-", "-"
    return f"{number:.1f}", "-" if mean is None else f"{mean - number:+.1f}"


def _setting(result: SweepResult) -> str:
    config = result.config
    folds = f"fold{'s' * (len(config.folds) > 1)} {', '.join(map(str, config.folds))}"
    episodes = f"{config.seeds} x {config.episodes} episodes"
    return f"mIoU in % on unseen classes, {folds}, protocol {config.protocol}, {episodes}"


def _remarks(result: SweepResult) -> list[str]:
    codes: dict[str, list[str]] = {}
    for name, trial in result.results.items():
        if trial.code:
            codes.setdefault(trial.code, []).append(name)
    mixed = [f"trained by code {code}: {', '.join(names)}" for code, names in codes.items()] if len(codes) > 1 else []
    return mixed + [f"{name} failed: {last_line(reason)}" for name, reason in result.failed.items()]
