"""Table 5: the model without each of its parts, and the hybrid without each of its; and prompts as in table 6."""

from dataclasses import replace

from pipelines.config import PROMPTS
from sweeps.paper_tables import Table, by_task, of_variants
from sweeps.results import SweepResult
from sweeps.studies.prompts import prompt_table
from sweeps.study import COMPLETE, HYBRID, Study, Variant, baseline

LA = (
    replace(COMPLETE, title="complete", paper={(1, 1): 39.2, (2, 1): 30.9}),
    Variant("no_spatial_convs", "w/o spatial convolutions", {"spatial_convs": False}, {(1, 1): 34.2, (2, 1): 27.6}),
    Variant("no_mixer", "w/o class-example mixer", {"class_example_mixer": False}, {(1, 1): 38.7, (2, 1): 30.9}),
    Variant("no_token_pool", "w/o token pool", {"token_pool": False}, {(1, 1): 38.3, (2, 1): 30.1}),
    baseline("prototype", "prototype (no training)"),
)


def hybrid_without(name: str, title: str, **changes) -> Variant:
    """The hybrid with some ingredient switched off."""
    return Variant(f"hybrid_no_{name}", f"w/o {title}", {**HYBRID.overrides, **changes})


HYBRIDS = (
    HYBRID,
    hybrid_without("prototypes", "prototypes", match_prototypes=False),
    hybrid_without("affinity", "affinity", match_affinity=False),
    hybrid_without("metric", "object metric", object_metric=False),
    hybrid_without("objectness", "objectness", objectness=0),
    hybrid_without("convs", "spatial convolutions", spatial_convs=False),
    hybrid_without("drop", "dropping maps", drop_maps=0.0),
)


def ablation_tables(result: SweepResult) -> list[Table]:
    """Table 5 and that of the hybrid, configuration by task with masks, and table 6 where there are other prompts."""
    tables = []
    if "mask" in result.config.prompts:
        for variants, texts in (
            (LA, ("table5", "Table 5: parts of the model", "paper: COCO-20i, fold 0")),
            (HYBRIDS, ("hybrid", "Parts of the hybrid", "beside table 5; the paper has no such model")),
        ):
            part = of_variants(result, variants)
            if part.variants:
                tables.append(by_task(part, *texts))
    return tables + prompt_table(result)


ABLATIONS = Study(
    "ablations",
    "Tables 5 and 6: LA, and the hybrid, without each of their parts, and by kind of prompt.",
    (*LA, *HYBRIDS),
    prompts=PROMPTS,
)
