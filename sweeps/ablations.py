"""The paper's ablations as data: what each variant changes, and the numbers the paper printed for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.config import Prompt

Task = tuple[int, int]  # ways, shots


@dataclass(frozen=True)
class Variant:
    """One row of a study: a name for files and commands, a title for tables, what differs from the complete model."""

    name: str
    title: str
    overrides: Mapping[str, Any] = field(default_factory=dict)  # TrainConfig fields
    paper: Mapping[Task, float] = field(default_factory=dict)  # mIoU in percent, masks as prompts, fold 0
    method: str = "la"  # or the name of a baseline, which is evaluated without training

    @property
    def trained(self) -> bool:
        return self.method == "la"


def ablations() -> tuple[Variant, ...]:
    """Table 5: the model without each of its parts, and the training-free prototype on the same episodes."""
    return (
        Variant("complete", "complete", {}, {(1, 1): 39.2, (2, 1): 30.9}),
        Variant("no_spatial_convs", "w/o spatial convolutions", {"spatial_convs": False}, {(1, 1): 34.2, (2, 1): 27.6}),
        Variant("no_mixer", "w/o class-example mixer", {"class_example_mixer": False}, {(1, 1): 38.7, (2, 1): 30.9}),
        Variant("no_token_pool", "w/o token pool", {"token_pool": False}, {(1, 1): 38.3, (2, 1): 30.1}),
        Variant("prototype", "prototype (no training)", method="prototype"),
    )


STUDIES = {"ablations": ablations}

# Table 6: prompt type at evaluation, mIoU in percent, mean over the four folds.
PROMPT_TITLES: dict[Prompt, str] = {"mask": "masks", "point_box": "boxes and points", "box": "boxes", "point": "points"}
PAPER_PROMPTS: dict[Prompt, dict[Task, float]] = {
    "mask": {(1, 1): 39.7, (1, 5): 41.2, (2, 1): 31.9, (2, 5): 32.5},
    "point_box": {(1, 1): 37.1, (1, 5): 40.5, (2, 1): 29.2, (2, 5): 30.7},
    "box": {(1, 1): 38.3, (1, 5): 40.9, (2, 1): 30.6, (2, 5): 31.5},
    "point": {(1, 1): 36.5, (1, 5): 39.9, (2, 1): 29.0, (2, 5): 29.4},
}
