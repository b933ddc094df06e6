"""Speed as a ratio, both sides measured in one run."""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from commands.options import console, say, verb
from la.errors import InputError
from pipelines.config import BackboneSettings, DeviceSettings, PathOrUri, Settings, StoreSettings, TrainConfig, setting

app = typer.Typer(help=__doc__, no_args_is_help=True)
PRESET = "paper, official, hybrid or debug."
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Pairs of passes; the median counts.")]
PhotosOption = Annotated[int, typer.Option("--photos", min=8, help="Photos of each pass.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Torch threads of each process.")]


class PhotoSettings(BackboneSettings):
    """Photos and the ViT they go through."""

    coco_dir: PathOrUri = setting(..., "Folder or URI with annotations/, train2017/ and val2017/.")


class AllSettings(StoreSettings):
    """What all measurements take."""

    coco_dir: PathOrUri | None = setting(None, "Folder or URI of the store's photos; adds featurizing.")
    weights: Path | None = setting(None, "Local weights in timm's names; not given: timm's own, from its hub.")
    out: Path | None = setting(None, "JSON file; not given: artifacts/bench.json in the workspace.")


class ViTSettings(Settings):
    """The backbone that a query goes through."""

    backbone: str = setting("vit_small_patch14_dinov2", "Any plain ViT of timm.")
    image_size: int = setting(420, "Side in pixels that photos are resized to.", ge=1)


@verb(app, PhotoSettings, name="featurize")
def bench_featurize(config: PhotoSettings, photos: PhotosOption = 32, repeats: RepeatsOption = 3) -> None:
    """The whole of featurizing against calling the bare backbone on decoded photos."""
    from pipelines.bench.ratios import bench_featurize as run

    show([run(config.coco_dir, config.backbone, config.weights, config.image_size, images=photos, repeats=repeats)])


@verb(app, StoreSettings, name="store")
def bench_store(config: StoreSettings, photos: PhotosOption = 300, repeats: RepeatsOption = 5) -> None:
    """Reading a photo's features at random against copying them from a raw memory map."""
    from pipelines.bench.int8_reading import bench_int8, int8_beside
    from pipelines.bench.ratios import bench_store as run
    from pipelines.store.convert import plain_store
    from pipelines.workspace import Workspace

    path = plain_store(Workspace(config.workspace), config.store)
    results = [run(path, images=photos, repeats=repeats)]
    if small := int8_beside(path):
        results += bench_int8(path, small, images=photos, repeats=repeats)
    show(results)


@verb(app, StoreSettings, name="episodes")
def bench_episodes(
    config: StoreSettings, fold: Annotated[int, typer.Option(help="COCO-20i fold.")] = 0, repeats: RepeatsOption = 5
) -> None:
    """Episodes drawn a second on one core, training (the mix of B, N, K) and testing."""
    from pipelines.bench.ratios import bench_episodes as run

    show([run(store_of(config), fold, repeats=repeats)])


@verb(app, StoreSettings, name="model")
def bench_model(
    config: StoreSettings,
    preset: Annotated[str, typer.Option(help=PRESET)] = "official",
    repeats: RepeatsOption = 5,
    threads: ThreadsOption = None,
) -> None:
    """Annotated pairs packed against the dense grid of supports and classes; the memory of 1 and of 20 shots."""
    from pipelines.bench.model_speed import bench_model as run

    with_threads(threads)
    show(run(store_of(config), preset, repeats))


@verb(app, StoreSettings, name="evaluate")
def bench_evaluate(
    config: StoreSettings,
    preset: Annotated[str, typer.Option(help=PRESET)] = "paper",
    episodes: Annotated[int, typer.Option(min=1, help="1-way 1-shot episodes.")] = 1000,
    repeats: RepeatsOption = 1,
    threads: ThreadsOption = None,
) -> None:
    """Evaluation against one episode at a time through the same model."""
    from pipelines.bench.ratios import bench_evaluate as run

    with_threads(threads)
    show([run(store_of(config), preset, episodes, repeats)])


@verb(app, StoreSettings, name="training")
def bench_training(
    config: StoreSettings,
    preset: Annotated[str, typer.Option(help=PRESET)] = "paper",
    batch_scale: Annotated[float, typer.Option(min=0.01, help="Times B in the recipe's (B, N, K).")] = 1.0,
    steps: Annotated[int, typer.Option(min=10, help="Steps of each training that count, after 20 that do not.")] = 30,
    repeats: RepeatsOption = 3,
    device: Annotated[str, typer.Option(help=DeviceSettings.model_fields["device"].description)] = "auto",
) -> None:
    """Ray Train with one worker against the same loop without Ray, and two workers against one, once they run."""
    from pipelines.bench.training_speed import bench_training as run

    batches = TrainConfig(preset=preset, batch_scale=batch_scale).batches
    show(run(config.workspace, preset, batches, steps, repeats, config.store, device))


@verb(app, ViTSettings, name="predict")
def bench_predict(
    config: ViTSettings,
    presets: Annotated[str, typer.Option(help="Some of paper, official, hybrid.")] = "paper,official,hybrid",
    ways: Annotated[int, typer.Option(min=1, help="Classes of an episode.")] = 1,
    shots: Annotated[int, typer.Option(min=1, help="Support images of each class.")] = 1,
    repeats: RepeatsOption = 5,
    threads: ThreadsOption = None,
) -> None:
    """One query against classes that are known already: the heads against the backbone."""
    from pipelines.bench.query_latency import bench_predict as run

    with_threads(threads)
    show(run(tuple(presets.split(",")), config.backbone, config.image_size, ways, shots, repeats))


@verb(app, StoreSettings, name="sweep")
def bench_sweep(
    config: StoreSettings,
    trials: Annotated[int, typer.Option(min=4, help="Made-up trials, which sleep; a multiple of 4.")] = 8,
) -> None:
    """What a trial of a sweep costs beyond its own work, through Ray Tune and MLflow, after the first."""
    from sweeps.trial_overhead import bench_sweep as run

    show([run(store_of(config), trials)])


@verb(app, AllSettings, name="all")
def bench_all(config: AllSettings) -> None:
    """Every measurement in one table, with the machine: a quarter of an hour. A JSON file keeps it.

    --coco-dir, the photos of the store, adds featurizing; an int8 store in the workspace adds reading that.
    """
    from pipelines.bench import int8_reading, model_speed, query_latency, ratios, training_speed
    from pipelines.store.reader import FeatureStore
    from pipelines.workspace import write_text
    from sweeps.trial_overhead import bench_sweep

    path, photos = store_of(config), config.coco_dir
    info = FeatureStore(path).info
    vit, size = info.backbone, info.image_size
    small, batches = int8_reading.int8_beside(path), TrainConfig().batches
    runs = {
        "featurize": photos and (lambda: [ratios.bench_featurize(photos, vit, config.weights, size)]),
        "store": lambda: [ratios.bench_store(path)],
        "episodes": lambda: [ratios.bench_episodes(path)],
        "model": lambda: model_speed.bench_model(path),
        "evaluate": lambda: [ratios.bench_evaluate(path)],
        "training": lambda: training_speed.bench_training(config.workspace, batches=batches, store=path.name),
        "sweep": lambda: [bench_sweep(path)],
        "predict": lambda: query_latency.bench_predict(backbone=vit, image_size=size),
        "int8": small and (lambda: int8_reading.bench_int8(path, small)),
    }
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler talks of its set-up otherwise
    about = ratios.machine()
    table = Table("measurement", "ratio", "bar", "", title="Speed, each ratio measured in one run")
    kept: dict[str, list] = {}
    for name, run in runs.items():
        if not run:
            continue
        say(f"{time.strftime('%T')} {name}")
        try:
            results = list(run())
        except InputError as error:  # the others are worth having
            table.add_row(name, "-", "-", f"not run: {error}")
            continue
        kept[name] = [asdict(result) | {"passed": result.passed} for result in results]
        for result in results:
            verdict = "passed" if result.passed else "FAILED"
            table.add_row(result.name, f"{result.ratio:.3f}", f"{result.sense} {result.bar:g}", verdict)
    console.print(table)
    file = config.out or config.workspace / "artifacts" / "bench.json"
    write_text(file, json.dumps({"machine": about, "at": time.strftime("%FT%T%z"), "results": kept}, indent=1))
    say(", ".join(f"{key} {value}" for key, value in about.items()), f"figures: {file}")
    if not all(result["passed"] for results in kept.values() for result in results):
        raise typer.Exit(1)


def store_of(config: StoreSettings) -> Path:
    """The folder of the feature store."""
    from pipelines.workspace import Workspace

    return Workspace(config.workspace).find_store(config.store)


def with_threads(threads: int | None) -> None:
    """Torch threads of this process, where they were given."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if threads:
        import torch

        torch.set_num_threads(threads)


def show(results: Iterable) -> None:
    """Print measurements as they come; exit code 1 where one misses its bar."""
    passed = True
    for result in results:
        say(str(result))
        passed &= result.passed
    if not passed:
        raise typer.Exit(1)
