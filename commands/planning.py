"""What a study will cost, before it is run."""

from typing import Annotated, Literal

import typer
from rich.table import Table

from commands.options import (
    BackboneOption,
    BatchScaleOption,
    DeviceOption,
    PhotosOption,
    RecipeOption,
    SizeOption,
    ThreadsOption,
    console,
    mistakes,
)

app = typer.Typer()


@app.command()
def plan(
    images: Annotated[
        int | None, typer.Option(min=1, help="Photos to featurize, all splits; default: those of --coco-dir or COCO.")
    ] = None,
    backbone: BackboneOption = "vit_base_patch16_224.mae",
    image_size: SizeOption = 480,
    dtype: Annotated[Literal["float16", "int8"], typer.Option(help="How features are stored.")] = "float16",
    workers: Annotated[int, typer.Option(min=1, help="Processes that work at once, one for each GPU.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that the workers are spread over.")] = 1,
    ram_gb: Annotated[float | None, typer.Option(min=1, help="Memory of each node; default: this one's.")] = None,
    folds: Annotated[int, typer.Option(min=1, max=4, help="Folds to train and to sweep.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each fold and variant.")] = 2000,
    preset: Annotated[str, typer.Option(help="paper, official, hybrid or debug.")] = "paper",
    recipe: RecipeOption = None,
    batch_scale: BatchScaleOption = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="Sets of test episodes of the sweep.")] = 5,
    episodes: Annotated[int, typer.Option(min=1, help="Test episodes of each set.")] = 1000,
    featurize_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Photos a second of one worker; default: measured here.")
    ] = None,
    steps_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Of one worker, features in memory; default: measured here.")
    ] = None,
    read_mb_per_second: Annotated[
        float | None, typer.Option(min=0.1, help="Of each node's way to the features; default: measured here.")
    ] = None,
    coco_dir: PhotosOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Disk, reading and hours of a study, and what will hold it up. What is not given is measured here in a minute.

    With --coco-dir the photos are counted, and the supports that their classes have; without, they are COCO's.
    Rates measured here are those of this machine: plan for another one with rates measured there.
    """
    with mistakes(), console.status("measuring on this machine what is not given"):
        from pipelines.bench.plan import PlanConfig, plan_study
        from sweeps.studies.ablations import ABLATIONS as STUDY

        config = PlanConfig(
            images=images,
            coco_dir=coco_dir,
            backbone=backbone,
            image_size=image_size,
            dtype=dtype,
            workers=workers,
            nodes=nodes,
            ram_gb=ram_gb,
            folds=folds,
            steps=steps,
            preset=preset,
            recipe=recipe,
            batch_scale=batch_scale,
            seeds=seeds,
            episodes=episodes,
            featurize_rate=featurize_rate,
            steps_per_second=steps_per_second,
            read_mb_per_second=read_mb_per_second,
            device=device,
            threads=threads,
        )
        variants = [variant.overrides for variant in STUDY.variants if variant.trained]
        tasks = [(ways, shots) for ways in STUDY.ways for shots in STUDY.shots for _ in STUDY.prompts]
        plan = plan_study(config, variants, tasks)
    sizes = Table("what", "number", title="Sizes and rates", title_justify="left")
    for row in plan.sizes.items():
        sizes.add_row(*row)
    table = Table("stage", "hours", "MB/s of a node", "bottleneck", title_justify="left")
    table.title = f"{workers} workers on {nodes} nodes"
    for stage in plan.stages:
        table.add_row(stage.name, f"{stage.hours:.3g}", f"{stage.read_mb:.0f}", stage.bottleneck)
    console.print(sizes, table, f"together {sum(stage.hours for stage in plan.stages):.3g} hours", sep="\n")
