"""What a study will cost, before it is run."""

import typer
from rich.table import Table

from commands.options import console, verb
from pipelines.config import PlanConfig

app = typer.Typer()


@verb(app, PlanConfig)
def plan(config: PlanConfig) -> None:
    """Disk, reading and hours of a study, and what will hold it up. What is not given is measured here in a minute.

    With --coco-dir the photos are counted, and the supports that their classes have; without, they are COCO's.
    Rates measured here are those of this machine: plan for another one with rates measured there.
    """
    from pipelines.bench.study_plan import plan_study
    from sweeps.study import find_study

    study = find_study("ablations")
    variants = [variant.settings for variant in study.variants if variant.trained]
    tasks = [(ways, shots) for ways in study.ways for shots in study.shots for _ in study.prompts]
    with console.status("measuring on this machine what is not given"):
        rows, stages = plan_study(config, variants, tasks)
    sizes = Table("what", "number", title="Sizes and rates", title_justify="left")
    for row in rows.items():
        sizes.add_row(*row)
    table = Table("stage", "hours", "MB/s of a node", "bottleneck", title_justify="left")
    table.title = f"{config.workers} workers on {config.nodes} nodes"
    for stage in stages:
        table.add_row(stage.name, f"{stage.hours:.3g}", f"{stage.read_mb:.0f}", stage.bottleneck)
    console.print(sizes, table, f"together {sum(stage.hours for stage in stages):.3g} hours", sep="\n")
