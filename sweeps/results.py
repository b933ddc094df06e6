"""What trials and sweeps come to, as plain data: one JSON file a trial, and all of a sweep together."""

import traceback
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from la.errors import InputError
from pipelines.config import Prompt, Settings, SweepConfig
from pipelines.workspace import digest
from sweeps.study import Study, Variant, task_title


class Score(Settings):
    """One evaluation: mIoU in percent, mean and standard deviation over its seeds, and on which episodes."""

    ways: int
    shots: int
    prompt: Prompt
    miou: float
    std: float
    interval: tuple[float, float]  # 95 %, bootstrap over episodes
    fb_iou: float
    per_seed: list[float]
    per_class: dict[str, float]
    episodes_digest: str
    classes_drawn: int
    method: str
    # mIoU of 1,000 resamples of the episodes, of which two methods on the same episodes have the same draws
    resampled: tuple[float, ...] = ()


class FoldResult(Settings):
    """The JSON file of a trial. It is written after every evaluation, so that a killed trial repeats at most one."""

    variant: str
    fold: int
    train_seed: int = 0
    finished: bool = False
    stopped_early: bool = False  # by a search, before the last step
    step: int = 0  # training steps done
    run_dir: Path | None = None  # of the training run
    checkpoint: Path | None = None
    training: dict[str, float] = Field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    impossible: dict[str, str] = Field(default_factory=dict)  # tasks for which there are too few images -> why
    seconds: float = 0.0
    code: str | None = None  # digests of the code that trained it

    def score(self, ways: int, shots: int, prompt: str) -> Score | None:
        return next((s for s in self.scores if (s.ways, s.shots, s.prompt) == (ways, shots, prompt)), None)

    @property
    def episodes_digest(self) -> str:
        """A digest of all evaluations' episodes: variants with the same one were judged on the same episodes."""
        return digest([s.episodes_digest for s in self.scores])


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended; trials are named `variant/foldN`, with several seeds of training `variant/foldN/seedS`."""

    config: SweepConfig
    name: str
    folder: Path  # result files and tables
    study: Study
    variants: tuple[Variant, ...]  # those that were run
    results: dict[str, FoldResult]  # finished trials
    failed: dict[str, str]  # trial -> error, its last line the message
    interrupted: bool  # stopped by Ctrl-C before every trial ended

    def by_seed(self, variant: str, fold: int, ways: int, shots: int, prompt: str) -> dict[int, Score]:
        """Seed of training -> a variant's score on one task and fold, of those that are finished."""
        trials = sorted(self.results.values(), key=lambda trial: trial.train_seed)
        mine = [trial for trial in trials if (trial.variant, trial.fold) == (variant, fold)]
        return {trial.train_seed: score for trial in mine if (score := trial.score(ways, shots, prompt))}

    def scores(self, variant: str, fold: int, ways: int, shots: int, prompt: str) -> list[Score]:
        """A variant's scores on one task and fold, of each seed of training that is finished."""
        return list(self.by_seed(variant, fold, ways, shots, prompt).values())


def task_name(ways: int, shots: int, prompt: str) -> str:
    """Such as "5-way 1-shot mask"."""
    return f"{task_title(ways, shots)} {prompt}"


def read_result(file: Path) -> FoldResult | None:
    """The result in `file`, finished or not; None where there is no file. InputError where it cannot be read."""
    if not file.exists():
        return None
    try:
        return FoldResult.model_validate_json(file.read_text())
    except ValueError as error:
        raise InputError(
            f"{file} is not the result of a trial ({str(error).splitlines()[0]}). It was edited, or written by another "
            "version: delete it, and the sweep makes it again."
        ) from error


def describe_error(error: Exception) -> str:
    """The message of an InputError, which needs no more; a traceback of any other, its last line the message."""
    return str(error) if isinstance(error, InputError) else "".join(traceback.format_exception(error))


def last_line(reason: str) -> str:
    """The message of what `describe_error` gave."""
    return reason.strip().splitlines()[-1]
