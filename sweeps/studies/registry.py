"""All studies by name, and what draws the tables of each."""

from sweeps.paper_tables import Table
from sweeps.results import SweepResult
from sweeps.studies.ablations import ABLATIONS, ablation_tables
from sweeps.studies.across_folds import FOLD_STUDY, fold_tables
from sweeps.studies.generalist import GENERALIST, generalist_tables
from sweeps.studies.nway import NWAY, nway_tables
from sweeps.studies.prompts import PROMPT_STUDY, prompt_table

STUDIES = {study.name: study for study in (ABLATIONS, PROMPT_STUDY, NWAY, FOLD_STUDY, GENERALIST)}
TABLES = {
    ABLATIONS.name: ablation_tables,
    PROMPT_STUDY.name: prompt_table,
    NWAY.name: nway_tables,
    FOLD_STUDY.name: fold_tables,
    GENERALIST.name: generalist_tables,
}


def tables_of(result: SweepResult) -> list[Table]:
    """The tables of the sweep's study."""
    return TABLES[result.config.study](result)
