"""All studies by name."""

from sweeps.ablations import ABLATIONS
from sweeps.folds import FOLD_STUDY
from sweeps.generalist import GENERALIST
from sweeps.nway import NWAY
from sweeps.prompts import PROMPT_STUDY

STUDIES = {study.name: study for study in (ABLATIONS, PROMPT_STUDY, NWAY, FOLD_STUDY, GENERALIST)}
