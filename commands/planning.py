"""What a study will cost, before it is run."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
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
    of_recipe,
)

app = typer.Typer()
COCO_PHOTOS = 123_287  # of train2017 and val2017


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
    with mistakes():
        from pipelines.config import TrainConfig, default_recipe

        training = TrainConfig(
            workspace=Path("unused"),
            preset=preset,
            **of_recipe(recipe or default_recipe(preset), batch_scale),
            steps=steps,
            device=device,
            threads=threads,
        )
        from pipelines.bench.cost import Cluster, bytes_per_image, images_per_step, rates_of_steps, store_bytes
        from pipelines.bench.rates import feature_shape, measure_featurizing, measure_reading
        from pipelines.bench.ratios import memory_gb

        swept = of_recipe(recipe or "small", batch_scale)  # as `sweep` takes it, whatever the preset asked for
        photos, photos_of = counted(coco_dir) if coco_dir else (COCO_PHOTOS, lambda c: images_per_step(c.batches))
        images = images or photos
        grid, channels = feature_shape(backbone, image_size)
        features = bytes_per_image(grid, channels, dtype)
        with tempfile.TemporaryDirectory(prefix="la-plan-") as name:
            folder = Path(name)
            disk_rate = read_mb_per_second or measure_with_status("reading", lambda: measure_reading(folder))
            cluster = Cluster(disk_rate, workers, nodes, ram_gb or memory_gb())
            rate = featurize_rate or measure_with_status(
                "the ViT",
                lambda: measure_featurizing(folder, backbone, image_size, device=device, threads=threads),
            )
            if steps_per_second:
                given = partial(rates_of_steps, steps_per_second)
                jobs = trials(training, swept, lambda c: given(c.batches), photos_of, seeds, episodes)
            else:
                here = measured_here(folder, backbone, image_size, photos_of)
                jobs = trials(training, swept, here, photos_of, seeds, episodes)
        show_plan(images, features, store_bytes(images, features), rate, jobs, folds, cluster, dtype)


def trials(training, swept: dict, rates_of: Callable, photos_of: Callable, seeds: int, episodes: int) -> tuple:
    """(the training asked for, the trials of the ablation sweep on one fold) with the rates and photos of each.

    `swept` are the recipe and batches of trials that have none of their own.
    """
    from pipelines.bench.cost import Training
    from sweeps.studies.ablations import ABLATIONS

    tasks = tuple(
        ((ways, shots), len(ABLATIONS.prompts) * seeds * episodes)
        for ways in ABLATIONS.ways
        for shots in ABLATIONS.shots
    )

    def job(config, tasks=()) -> Training:
        drawn = config.train_batches * sum(size for size, _, _ in config.batches) // len(config.batches)
        lengths = (config.steps, config.val_every, config.val_episodes)
        return Training(config.batches, *lengths, rates_of(config), drawn, tasks, photos_of(config))

    sweep = []
    for variant in ABLATIONS.variants:
        if variant.trained:
            known = swept | dict(variant.overrides)
            if "recipe" in variant.overrides:  # settings of its own, batches included
                known.pop("batches")
            base = {"steps": training.steps, "device": training.device, "threads": training.threads}
            sweep.append(job(type(training)(workspace=training.workspace, **(base | known)), tasks))
    return job(training), sweep


def counted(coco_dir) -> tuple[int, Callable]:
    """(photos of a COCO folder, what a training config reads of them in a step)"""
    from la.data.coco import find_splits, load_coco
    from pipelines.bench.rates import photos_drawn

    with console.status(f"reading the annotations of {coco_dir}"):
        datasets = {split: load_coco(file, None, split) for split, (file, _) in find_splits(coco_dir).items()}
    known: dict[tuple, float] = {}

    def photos_of(config) -> float:
        if config.batches not in known:
            known[config.batches] = photos_drawn(config, datasets["train"])
        return known[config.batches]

    return sum(len(dataset.images) for dataset in datasets.values()), photos_of


def measured_here(folder: Path, backbone: str, image_size: int, photos_of: Callable) -> Callable:
    """Rates of a training config, measured on made-up features once for each preset and its batches."""
    from pipelines.bench.rates import made_up_store, measure_training

    workspace = made_up_store(folder, backbone, image_size)
    known: dict[tuple, object] = {}

    def rates_of(config):
        # the variants of a preset cost nearly the same: one with all its parts stands for them
        key = (config.preset, config.batches)
        if key not in known:
            base = type(config)(
                workspace=workspace,
                preset=config.preset,
                recipe=config.recipe,
                batches=config.batches,
                device=config.device,
                threads=config.threads,
            )
            rates = measure_with_status(f"training, {config.preset}", lambda: measure_training(base, ((1, 1), (2, 1))))
            known[key] = rates.with_photos(photos_of(config), config.batches)
        return known[key]

    return rates_of


def measure_with_status(what: str, measure: Callable):
    """Return what `measure` returns; until then, the terminal says what is being measured."""
    with console.status(f"measuring {what} on this machine"):
        return measure()


def show_plan(images, features, store, rate, jobs, folds, cluster, dtype) -> None:
    """The plan as two tables: sizes and rates, then stages."""
    from pipelines.bench.cost import plan_featurizing, plan_sweep, plan_training

    training, sweep = jobs
    read = training.photos_a_step
    sizes = Table("what", "number", title="Sizes and rates", title_justify="left")
    sizes.add_row(f"features of a photo, {dtype}", f"{features / 1e6:.3f} MB")
    sizes.add_row(f"store of {images} photos", f"{store / 1e9:.1f} GB")
    sizes.add_row("of it, a node's memory holds", f"{100 * cluster.cached(store):.0f} %")
    sizes.add_row("a worker reads in a training step", f"{read:.1f} photos, {read * features / 1e6:.0f} MB")
    sizes.add_row("a worker featurizes", f"{rate:.3g} photos/s")
    sizes.add_row("a worker trains", f"{1 / training.rates.step_seconds:.3g} steps/s")
    sizes.add_row("a worker evaluates, 1-way 1-shot", f"{1 / training.rates.episode((1, 1)):.3g} episodes/s")
    sizes.add_row("a node's disk gives", f"{cluster.read_mb:.0f} MB/s")
    console.print(sizes)
    stages = [
        plan_featurizing(images, features, rate, cluster),
        plan_training(f"train {folds} folds", [training] * folds, features, store, cluster),
        plan_sweep(f"sweep ablations, {len(sweep) * folds} trials", sweep * folds, features, store, cluster),
    ]
    table = Table("stage", "hours", "MB/s of a node", "bottleneck", title_justify="left")
    table.title = f"{cluster.workers} workers on {cluster.nodes} nodes"
    for stage in stages:
        table.add_row(stage.name, f"{stage.hours:.3g}", f"{stage.read_mb:.0f}", stage.bottleneck)
    console.print(table)
    console.print(f"together {sum(stage.hours for stage in stages):.3g} hours")
