"""All studies by name."""

from sweeps.studies.ablations import ABLATIONS
from sweeps.studies.across_folds import FOLD_STUDY
from sweeps.studies.generalist import GENERALIST
from sweeps.studies.nway import NWAY
from sweeps.studies.prompts import PROMPT_STUDY

STUDIES = {study.name: study for study in (ABLATIONS, PROMPT_STUDY, NWAY, FOLD_STUDY, GENERALIST)}
