"""Figure 3: how methods keep up with more and more classes at once, 1-shot."""

from sweeps.paper_tables import Table, by_task
from sweeps.results import SweepResult
from sweeps.studies.across_folds import BASELINES
from sweeps.study import COMPLETE, HYBRID, Study

WAYS = (1, 2, 3, 4, 5, 10, 15, 20)


def nway_tables(result: SweepResult) -> list[Table]:
    """Method by number of ways."""
    return [
        by_task(result, "figure3", "Figure 3: N-way mIoU", "the paper shows its numbers as a plot only", paper=False)
    ]


NWAY = Study(
    "nway",
    "Figure 3: N = 1 to 20 classes at once, LA and the baselines.",
    (COMPLETE, HYBRID, *BASELINES),
    ways=WAYS,
)
