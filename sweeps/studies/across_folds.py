"""Tables 1 and 3: methods on all four folds, 1-way, and several ways at once."""

from dataclasses import replace

from sweeps.paper_tables import Table, fold_table
from sweeps.results import SweepResult
from sweeps.study import COMPLETE, HYBRID, OFFICIAL, Study, baseline

LA = {
    (1, 1): 39.7,
    (1, 5): 41.2,
    (2, 1): (30.6, 33.6, 32.2, 31.2),
    (5, 1): (21.1, 25.1, 26.4, 27.5),
}
# The paper's rows for the methods that each baseline is like.
PANET = {(1, 1): 23.0, (1, 5): 33.8, (2, 1): (25.7, 16.1, 16.2, 13.8), (5, 1): (22.1, 16.0, 14.1, 11.9)}
PPNET = {(1, 1): 27.2, (1, 5): 36.7, (2, 1): (29.8, 19.7, 17.0, 15.1), (5, 1): (25.6, 17.3, 15.5, 13.4)}
DCAMA = {(1, 1): 50.9}
BASELINES = (
    baseline("prototype", "prototype (like PANet)", PANET),
    baseline("parts", "parts (like PPNet)", PPNET),
    baseline("affinity", "affinity (like DCAMA)", DCAMA),
    baseline("ridge", "ridge probe"),
)


def fold_tables(result: SweepResult) -> list[Table]:
    """One table for each task: as in the paper's table 1 for 1-way tasks, as in its table 3 for more ways."""
    config = result.config
    return [
        fold_table(result, f"table{1 if ways == 1 else 3}-{ways}way-{shots}shot", (ways, shots))
        for ways in config.ways
        for shots in config.shots
    ]


FOLD_STUDY = Study(
    "folds",
    "Tables 1 and 3: LA in all presets and every baseline, on every fold, with 1, 2 and 5 ways.",
    (replace(COMPLETE, paper=LA), replace(OFFICIAL, paper=LA), HYBRID, *BASELINES),
    folds=(0, 1, 2, 3),
    ways=(1, 2, 5),
    shots=(1, 5),
)
