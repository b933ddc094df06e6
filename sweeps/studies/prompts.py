"""Table 6: kinds of prompt at evaluation."""

from pipelines.config import PROMPTS, Prompt
from sweeps.paper_tables import Table, task_table
from sweeps.results import SweepResult
from sweeps.study import COMPLETE, HYBRID, Study, Task

TITLES: dict[Prompt, str] = {"mask": "masks", "point_box": "boxes and points", "box": "boxes", "point": "points"}
# mIoU in percent, mean over the four folds.
PAPER: dict[Prompt, dict[Task, float]] = {
    "mask": {(1, 1): 39.7, (1, 5): 41.2, (2, 1): 31.9, (2, 5): 32.5},
    "point_box": {(1, 1): 37.1, (1, 5): 40.5, (2, 1): 29.2, (2, 5): 30.7},
    "box": {(1, 1): 38.3, (1, 5): 40.9, (2, 1): 30.6, (2, 5): 31.5},
    "point": {(1, 1): 36.5, (1, 5): 39.9, (2, 1): 29.0, (2, 5): 29.4},
}


def prompt_table(result: SweepResult) -> list[Table]:
    """Prompt kind by task, of the complete model and of the hybrid; nothing where the sweep has neither."""
    prompts = [p for p in TITLES if p in result.config.prompts]
    rows = []
    for variant in result.variants:
        if variant.name == COMPLETE.name:
            rows += [(TITLES[p], variant.name, p, PAPER[p]) for p in prompts]
        elif variant.name == HYBRID.name:
            rows += [(f"hybrid: {TITLES[p]}", variant.name, p, {}) for p in prompts]
    if not rows:
        return []
    note = "paper: COCO-20i, mean of four folds"
    return [task_table(result, "table6", "Table 6: prompts at evaluation", rows, note)]


PROMPT_STUDY = Study(
    "prompts",
    "Table 6: masks, boxes and points as prompts at evaluation.",
    (COMPLETE, HYBRID),
    folds=(0, 1, 2, 3),
    shots=(1, 5),
    prompts=PROMPTS,
)
