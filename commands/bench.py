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

from commands.options import (
    WORKSPACE,
    BackboneOption,
    BatchScaleOption,
    CocoOption,
    DeviceOption,
    FoldOption,
    PhotosOption,
    RepeatsOption,
    ShotsOption,
    SizeOption,
    StoreOption,
    ThreadsOption,
    WaysOption,
    WeightsOption,
    WorkspaceOption,
    console,
    mistakes,
    of_recipe,
)
from la.errors import InputError

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command("featurize")
def bench_featurize(
    coco_dir: CocoOption,
    backbone: BackboneOption = "vit_base_patch16_224.mae",
    weights: WeightsOption = None,
    image_size: SizeOption = 480,
    images: Annotated[int, typer.Option(min=8, help="Photos of each pass.")] = 32,
    repeats: RepeatsOption = 3,
) -> None:
    """The whole of featurizing against calling the bare backbone on decoded photos."""
    with mistakes():
        from pipelines.bench.ratios import bench_featurize as run

        show([run(coco_dir, backbone, weights, image_size, images=images, repeats=repeats)])


@app.command("store")
def bench_store(
    images: Annotated[int, typer.Option(min=8, help="Photos of each pass.")] = 300,
    repeats: RepeatsOption = 5,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Reading a photo's features at random against copying them from a raw memory map."""
    with mistakes():
        from pipelines.bench.ratios import bench_store as run
        from pipelines.bench.scale import bench_int8, int8_beside
        from pipelines.store.convert import plain_store
        from pipelines.workspace import Workspace

        path = plain_store(Workspace(workspace), store)
        results = [run(path, images=images, repeats=repeats)]
        if small := int8_beside(path):
            results += bench_int8(path, small, images=images, repeats=repeats)
        show(results)


@app.command("episodes")
def bench_episodes(
    fold: FoldOption = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Passes; the median counts.")] = 5,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Episodes drawn a second on one core, training (the mix of B, N, K) and testing."""
    with mistakes():
        from pipelines.bench.ratios import bench_episodes as run
        from pipelines.workspace import Workspace

        show([run(Workspace(workspace).find_store(store), fold, repeats=repeats)])


@app.command("model")
def bench_model(
    preset: Annotated[str, typer.Option(help="paper, official or debug.")] = "official",
    repeats: RepeatsOption = 5,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Annotated pairs packed against the dense grid of supports and classes; the memory of 1 and of 20 shots."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler talks of its set-up otherwise
    with mistakes():
        import torch

        from pipelines.bench.model_speed import bench_model as run
        from pipelines.workspace import Workspace

        if threads:
            torch.set_num_threads(threads)
        show(run(Workspace(workspace).find_store(store), preset, repeats))


@app.command("evaluate")
def bench_evaluate(
    preset: Annotated[str, typer.Option(help="paper, official, hybrid or debug.")] = "paper",
    count: Annotated[int, typer.Option("--episodes", min=1, help="1-way 1-shot episodes.")] = 1000,
    repeats: RepeatsOption = 1,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Evaluation against one episode at a time through the same model."""
    with mistakes():
        import torch

        from pipelines.bench.ratios import bench_evaluate as run
        from pipelines.workspace import Workspace

        if threads:
            torch.set_num_threads(threads)
        show([run(Workspace(workspace).find_store(store), preset, count, repeats)])


@app.command("training")
def bench_training(
    preset: Annotated[str, typer.Option(help="paper, official, hybrid or debug.")] = "paper",
    batch_scale: BatchScaleOption = 1.0,
    steps: Annotated[int, typer.Option(min=10, help="Steps of each training that count, after 20 that do not.")] = 30,
    repeats: RepeatsOption = 3,
    device: DeviceOption = "auto",
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Ray Train with one worker against the same loop without Ray, and two workers against one, once they run."""
    with mistakes():
        from pipelines.bench.training_speed import bench_training as run
        from pipelines.config import default_recipe

        batches = of_recipe(default_recipe(preset), batch_scale)["batches"]
        show(run(workspace.absolute(), preset, batches, steps, repeats, store, device))


@app.command("scale")
def bench_scale(
    images: Annotated[int, typer.Option(min=1000, help="Of the made-up store.")] = 100_000,
    count: Annotated[int, typer.Option("--episodes", min=1000, help="Drawn, written and read.")] = 1_000_000,
) -> None:
    """A made-up store of very many images and its episodes: seconds and memory against their bars."""
    with mistakes():
        from pipelines.bench.scale import bench_scale as run

        show(run(images, count))


@app.command("predict")
def bench_predict(
    preset: Annotated[str, typer.Option(help="paper, official, hybrid, or several with commas.")] = (
        "paper,official,hybrid"
    ),
    backbone: BackboneOption = "vit_small_patch14_dinov2",
    image_size: SizeOption = 420,
    ways: WaysOption = 1,
    shots: ShotsOption = 1,
    repeats: RepeatsOption = 5,
    threads: ThreadsOption = None,
) -> None:
    """One query against classes that are known already: the heads against the backbone."""
    with mistakes():
        import torch

        from pipelines.bench.query_latency import bench_predict as run

        if threads:
            torch.set_num_threads(threads)
        show(run(tuple(preset.split(",")), backbone, image_size, ways, shots, repeats))


@app.command("sweep")
def bench_sweep(
    trials: Annotated[int, typer.Option(min=4, help="Made-up trials, which sleep; a multiple of 4.")] = 8,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """What a trial of a sweep costs beyond its own work, through Ray Tune and MLflow, after the first."""
    with mistakes():
        from pipelines.workspace import Workspace
        from sweeps.trial_overhead import bench_sweep as run

        show([run(Workspace(workspace).find_store(store), trials)])


@app.command("all")
def bench_all(
    coco_dir: PhotosOption = None,
    weights: WeightsOption = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; default: artifacts/bench.json in the workspace.")] = None,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Every measurement but `scale` in one table, with the machine: a quarter of an hour. A JSON file keeps it.

    --coco-dir, the photos of the store, adds featurizing; an int8 store in the workspace adds reading that.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with mistakes():
        from pipelines.bench import model_speed, query_latency, ratios, scale, training_speed
        from pipelines.store.reader import FeatureStore
        from pipelines.workspace import Workspace, write_text
        from sweeps.trial_overhead import bench_sweep

        root = Workspace(workspace)
        path = root.find_store(store)
        info = FeatureStore(path).info
        vit, size = info.backbone, info.image_size
        batches = of_recipe("small", 1.0)["batches"]
        runs = {
            "store": lambda: [ratios.bench_store(path)],
            "episodes": lambda: [ratios.bench_episodes(path)],
            "model": lambda: model_speed.bench_model(path),
            "evaluate": lambda: [ratios.bench_evaluate(path)],
            "training": lambda: training_speed.bench_training(root.root, batches=batches, store=path.name),
            "sweep": lambda: [bench_sweep(path)],
            "predict": lambda: query_latency.bench_predict(backbone=vit, image_size=size),
        }
        if small := scale.int8_beside(path):
            runs["int8"] = lambda: scale.bench_int8(path, small)
        if coco_dir:
            runs = {"featurize": lambda: [ratios.bench_featurize(coco_dir, vit, weights, size)]} | runs
        about = ratios.machine()
        table = Table("measurement", "ratio", "bar", "", title="Speed, each ratio measured in one run")
        kept: dict[str, list] = {}
        for name, run in runs.items():
            with console.status(name):
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
        console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
        file = out or root.artifacts / "bench.json"
        write_text(file, json.dumps({"machine": about, "at": time.strftime("%FT%T%z"), "results": kept}, indent=1))
        console.print(f"figures: {file}", highlight=False, soft_wrap=True)
        if not all(result["passed"] for results in kept.values() for result in results):
            raise typer.Exit(1)


def show(results: Iterable) -> None:
    """Print measurements as they come; exit code 1 where one misses its bar."""
    passed = True
    for result in results:
        console.print(str(result), highlight=False, markup=False)
        passed &= result.passed
    if not passed:
        raise typer.Exit(1)
