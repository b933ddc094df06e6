"""Table 4: the test classes are seen in training."""

from sweeps.paper_tables import Table, by_task
from sweeps.results import SweepResult
from sweeps.study import COMPLETE, Study, Variant

VARIANTS = (
    Variant("generalist", "LA, test classes seen", {"classes": "all"}, {(1, 1): 50.5, (1, 5): 53.5}),
    COMPLETE,
)


def generalist_tables(result: SweepResult) -> list[Table]:
    """The same model with and without the test classes in training."""
    return [by_task(result, "table4", "Table 4: test classes seen in training", "paper: COCO-20i, mean of four folds")]


GENERALIST = Study(
    "generalist",
    "Table 4: LA trained on the test classes too, beside LA that was not.",
    VARIANTS,
    folds=(0, 1, 2, 3),
    ways=(1,),
    shots=(1, 5),
)
