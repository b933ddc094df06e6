"""One trial of a sweep, one variant on one fold: train, evaluate, and leave one JSON file that says how it ended.

Imported by the sweep's workers, so nothing here loads MLflow or Ray.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from la.errors import TooFewImages
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.workspace import write_text
from sweeps.results import FoldResult, Score, read_result, task_name
from sweeps.study import Variant

Report = Callable[[dict], None]
REPORT_SECONDS = 1.0  # between reports of an evaluation


@dataclass(frozen=True)
class TrialSpec:
    """What one trial has to do."""

    variant: Variant
    train: TrainConfig | None  # None for a method without training
    # of `la`: without the checkpoint, which training gives; none in a search, which trains alone
    evaluations: tuple[EvaluateConfig, ...]
    file: Path  # where the result goes
    seeded: bool = False  # whether its sweep has several seeds of training

    @property
    def fold(self) -> int:
        return self.train.fold if self.train else self.evaluations[0].fold

    @property
    def name(self) -> str:
        return trial_name(self.variant.name, self.fold, self.train.seed if self.train and self.seeded else None)


def trial_name(variant: str, fold: int, train_seed: int | None = None) -> str:
    """Such as complete/fold0, or complete/fold0/seed1."""
    return f"{variant}/fold{fold}" + ("" if train_seed is None else f"/seed{train_seed}")


def run_trial(
    job: TrialSpec,
    report: Report,
    train: Callable | None = None,
    evaluate: Callable | None = None,
    code: Literal["ask", "again", "keep"] = "ask",
) -> FoldResult:
    """Train (or go on, or find it finished), evaluate what is not evaluated yet, write `job.file` whole each time.

    `report` gets {"phase": "train", **training's reports} and {"phase": "evaluate", "done": episodes, "of": episodes}.
    `train` and `evaluate` default to the pipelines', `code` as in `train` there; errors of either pass through.
    """
    if train is None and job.train:
        from pipelines.training.run import train as trains

        train = partial(trains, code=code)
    if evaluate is None:
        from pipelines.evaluation.evaluate import evaluate
    started = time.monotonic()
    result = FoldResult(variant=job.variant.name, fold=job.fold, train_seed=job.train.seed if job.train else 0)
    if job.train:
        trained = train(job.train, lambda metrics: report({"phase": "train", **metrics}))
        result = result.model_copy(
            update={
                "step": trained.step,
                "run_dir": trained.run_dir,
                "checkpoint": trained.checkpoint,
                "code": trained.code,
                "training": {k: v for k, v in trained.metrics.items() if v is not None},
            }
        )
    earlier = read_result(job.file)
    # A time-limited training goes on at each start; scores of its earlier checkpoint are not this one's.
    if earlier and (earlier.step, earlier.checkpoint) == (result.step, result.checkpoint):
        result = result.model_copy(update={"scores": earlier.scores, "seconds": earlier.seconds})
    before = result.seconds
    total = sum(c.seeds * c.episodes for c in job.evaluations)
    for number, config in enumerate(job.evaluations):
        if not result.score(config.ways, config.shots, config.prompt):
            config = config.model_copy(update={"checkpoint": result.checkpoint})
            offset = sum(c.seeds * c.episodes for c in job.evaluations[:number])
            try:
                outcome = evaluate(config, _throttled(report, offset, total))
            except TooFewImages as error:  # the other tasks are worth having
                task = task_name(config.ways, config.shots, config.prompt)
                result = result.model_copy(update={"impossible": result.impossible | {task: str(error)}})
                continue
            score = Score(
                ways=config.ways,
                shots=config.shots,
                prompt=config.prompt,
                **{name: getattr(outcome, name) for name in set(Score.model_fields) - {"ways", "shots", "prompt"}},
            )
            result = result.model_copy(
                update={"scores": (*result.scores, score), "seconds": before + time.monotonic() - started}
            )
            write_text(job.file, result.model_dump_json(indent=1))
    result = result.model_copy(update={"finished": True})
    write_text(job.file, result.model_dump_json(indent=1))
    return result


def finished(job: TrialSpec) -> FoldResult | None:
    """The result of a trial that is finished."""
    result = read_result(job.file)
    return result if result and result.finished else None


def _throttled(report: Report, offset: int, total: int) -> Callable[[int, int], None]:
    last = -REPORT_SECONDS

    def progress(done: int, _: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            report({"phase": "evaluate", "done": offset + done, "of": total})

    return progress
