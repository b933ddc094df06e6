"""Speed as a ratio, both sides measured in one run."""

import os
from typing import Annotated

import typer

from commands.common import (
    WORKSPACE,
    BackboneOption,
    BatchScaleOption,
    CocoOption,
    DeviceOption,
    FoldOption,
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
        from pipelines.bench import bench_featurize as run

        show_bench(run(coco_dir, backbone, weights, image_size, images=images, repeats=repeats))


@app.command("store")
def bench_store(
    images: Annotated[int, typer.Option(min=8, help="Photos of each pass.")] = 300,
    repeats: RepeatsOption = 5,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Reading a photo's features at random against copying them from a raw memory map."""
    with mistakes():
        from pipelines.bench import bench_store as run
        from pipelines.bench_scale import bench_int8, int8_beside
        from pipelines.convert import plain_store
        from pipelines.workspace import Workspace

        path = plain_store(Workspace(workspace), store)
        show_bench(run(path, images=images, repeats=repeats))
        if small := int8_beside(path):
            for result in bench_int8(path, small, images=images, repeats=repeats):
                show_bench(result)


@app.command("episodes")
def bench_episodes(
    fold: FoldOption = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Passes; the median counts.")] = 5,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Episodes drawn a second on one core, training (the mix of B, N, K) and testing."""
    with mistakes():
        from pipelines.bench import bench_episodes as run
        from pipelines.workspace import Workspace

        show_bench(run(Workspace(workspace).find_store(store), fold, repeats=repeats))


@app.command("model")
def bench_model(
    preset: Annotated[str, typer.Option(help="paper, official or debug.")] = "official",
    repeats: RepeatsOption = 5,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Annotated pairs packed against the dense grid of supports and classes; the memory of 1 and of 20 shots."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler talks of its set-up otherwise
    with mistakes():
        import torch

        from pipelines.bench_model import bench_model as run
        from pipelines.workspace import Workspace

        if threads:
            torch.set_num_threads(threads)
        results = run(Workspace(workspace).find_store(store), preset, repeats)
        for result in results:
            console.print(str(result), highlight=False, markup=False)
        if not all(result.passed for result in results):
            raise typer.Exit(1)


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

        from pipelines.bench import bench_evaluate as run
        from pipelines.workspace import Workspace

        if threads:
            torch.set_num_threads(threads)
        show_bench(run(Workspace(workspace).find_store(store), preset, count, repeats))


@app.command("training")
def bench_training(
    preset: Annotated[str, typer.Option(help="paper, official, hybrid or debug.")] = "paper",
    batch_scale: BatchScaleOption = 0.5,
    steps: Annotated[int, typer.Option(min=10, help="Steps of each training that count, after 20 that do not.")] = 60,
    repeats: RepeatsOption = 3,
    device: DeviceOption = "auto",
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Ray Train with one worker against the same loop without Ray, and two workers against one, once they run."""
    with mistakes():
        from pipelines.bench_training import bench_training as run
        from pipelines.config import default_recipe

        batches = of_recipe(default_recipe(preset), batch_scale)["batches"]
        results = run(workspace.absolute(), preset, batches, steps, repeats, store, device)
        for result in results:
            console.print(str(result), highlight=False, markup=False)
        if not all(result.passed for result in results):
            raise typer.Exit(1)


@app.command("scale")
def bench_scale(
    images: Annotated[int, typer.Option(min=1000, help="Of the made-up store.")] = 100_000,
    count: Annotated[int, typer.Option("--episodes", min=1000, help="Drawn, written and read.")] = 1_000_000,
) -> None:
    """A made-up store of very many images and its episodes: seconds and memory against their bars."""
    with mistakes():
        from pipelines.bench_scale import bench_scale as run

        results = []
        for result in run(images, count):
            console.print(str(result), highlight=False, markup=False)
            results.append(result)
        if not all(result.passed for result in results):
            raise typer.Exit(1)


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

        from pipelines.bench_predict import bench_predict as run

        if threads:
            torch.set_num_threads(threads)
        results = run(tuple(preset.split(",")), backbone, image_size, ways, shots, repeats)
        for result in results:
            console.print(str(result), highlight=False, markup=False)
        if not all(result.passed for result in results):
            raise typer.Exit(1)


@app.command("sweep")
def bench_sweep(
    trials: Annotated[int, typer.Option(min=4, help="Made-up trials, which sleep; a multiple of 4.")] = 8,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """What a trial of a sweep costs beyond its own work, through Ray Tune and MLflow, after the first."""
    with mistakes():
        from pipelines.workspace import Workspace
        from sweeps.bench import bench_sweep as run

        show_bench(run(Workspace(workspace).find_store(store), trials))


def show_bench(result) -> None:
    """Print a measurement; exit code 1 where it misses its bar."""
    console.print(str(result), highlight=False, markup=False)
    if not result.passed:
        raise typer.Exit(1)
