"""Table 5: the model without each of its parts, the training-free prototype beside it; and prompts as in table 6."""

from dataclasses import replace

from pipelines.config import PROMPTS
from sweeps.prompts import prompt_table
from sweeps.study import COMPLETE, Study, Variant, baseline
from sweeps.tables import by_task

VARIANTS = (
    replace(COMPLETE, title="complete", paper={(1, 1): 39.2, (2, 1): 30.9}),
    Variant("no_spatial_convs", "w/o spatial convolutions", {"spatial_convs": False}, {(1, 1): 34.2, (2, 1): 27.6}),
    Variant("no_mixer", "w/o class-example mixer", {"class_example_mixer": False}, {(1, 1): 38.7, (2, 1): 30.9}),
    Variant("no_token_pool", "w/o token pool", {"token_pool": False}, {(1, 1): 38.3, (2, 1): 30.1}),
    baseline("prototype", "prototype (no training)"),
)


def ablation_tables(result):
    """Table 5, configuration by task with mask prompts, and table 6 where other prompts were evaluated."""
    tables = []
    if "mask" in result.config.prompts:
        tables.append(by_task(result, "table5", "Table 5: parts of the model", "paper: COCO-20i, fold 0"))
    return tables + prompt_table(result)


ABLATIONS = Study(
    "ablations",
    "Tables 5 and 6: LA without each of its parts, and by kind of prompt.",
    VARIANTS,
    ablation_tables,
    prompts=PROMPTS,
)
