"""What a study is: its variants, what they are evaluated on, and the numbers the paper printed for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.config import Prompt

Task = tuple[int, int]  # ways, shots
Paper = Mapping[Task, float | tuple[float, ...]]  # mIoU in percent; a tuple has one number a fold


def task_title(ways: int, shots: int) -> str:
    """Such as "5-way 1-shot"."""
    return f"{ways}-way {shots}-shot"


@dataclass(frozen=True)
class Variant:
    """One row of a study: a name for files and commands, a title for tables, what differs from the complete model."""

    name: str
    title: str
    overrides: Mapping[str, Any] = field(default_factory=dict)  # TrainConfig fields
    paper: Paper = field(default_factory=dict)  # masks as prompts
    method: str = "la"  # or the name of a baseline, which is evaluated without training

    @property
    def trained(self) -> bool:
        return self.method == "la"


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper: what to train, and the tasks to evaluate it on by default."""

    name: str
    about: str  # for --help
    variants: tuple[Variant, ...]
    folds: tuple[int, ...] = (0,)
    ways: tuple[int, ...] = (1, 2)
    shots: tuple[int, ...] = (1,)
    prompts: tuple[Prompt, ...] = ("mask",)


COMPLETE = Variant("complete", "LA, paper preset")
# The released model is larger: the learning rate that suits few photos is lower than the paper preset's.
OFFICIAL = Variant("official", "LA, official preset", {"preset": "official", "lr": 1e-4})
# It has a recipe of its own, batches included.
HYBRID = Variant("hybrid", "LA, hybrid preset", {"preset": "hybrid", "recipe": "hybrid"})


def baseline(method: str, title: str, paper: Paper | None = None) -> Variant:
    """A method without training, by its name in `la.evaluation.baselines`."""
    return Variant(method, title, paper=paper or {}, method=method)
