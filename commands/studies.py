"""Many trainings and evaluations, and how their results are looked at."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
    WORKSPACE,
    AddressOption,
    AlsoOption,
    BatchScaleOption,
    DeviceOption,
    FoldOption,
    FoldsOption,
    LrOption,
    ProtocolEpisodesOption,
    ProtocolOption,
    ProtocolSeedsOption,
    RecipeOption,
    StoreOption,
    WorkspaceOption,
    commas,
    console,
    mistakes,
    numbers,
    of_recipe,
)
from sweeps.studies.registry import STUDIES, tables_of
from sweeps.study import Study

app = typer.Typer()
sweep_app = typer.Typer(help="Sweeps on Ray Tune: many trainings and evaluations, one table.", no_args_is_help=True)


ConcurrentOption = Annotated[
    int | None, typer.Option(min=1, help="Trials at once; default: as many as CPUs and GPUs take.")
]
GpusOption = Annotated[float | None, typer.Option(min=0, help="GPUs of each trial; a fraction shares one.")]
TrialWorkersOption = Annotated[
    int, typer.Option("--workers", min=0, help="Ray Train workers of each training; 0: the trial trains alone.")
]
TrialThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of each trial or worker.")]
TrackingOption = Annotated[str | None, typer.Option(help="An MLflow server; default: the workspace's.")]


def add_study(study: Study) -> None:
    """The verb `sweep <study>`: all studies have the same options, with defaults of their own."""

    def command(
        folds: FoldsOption = commas(study.folds),
        steps: Annotated[int, typer.Option(min=1, help="Training steps of each variant.")] = 2000,
        minutes: Annotated[float | None, typer.Option(help="Stop each training after this long.")] = None,
        recipe: RecipeOption = None,
        lr: LrOption = None,
        batch_scale: BatchScaleOption = 1.0,
        dim: Annotated[int | None, typer.Option(help="Channels after the neck; default: the preset's.")] = None,
        also: AlsoOption = None,
        variants: Annotated[
            str | None, typer.Option(help=f"Some of {commas(v.name for v in study.variants)}; default: all.")
        ] = None,
        protocol: ProtocolOption = "la",
        seeds: ProtocolSeedsOption = None,
        count: ProtocolEpisodesOption = None,
        ways: Annotated[str, typer.Option(help="Ways of the evaluations.")] = commas(study.ways),
        shots: Annotated[str, typer.Option(help="Shots of the evaluations.")] = commas(study.shots),
        concurrent: ConcurrentOption = None,
        address: AddressOption = None,
        gpus: GpusOption = None,
        workers: TrialWorkersOption = 0,
        workspace: WorkspaceOption = WORKSPACE,
        store: StoreOption = None,
        device: DeviceOption = "auto",
        threads: TrialThreadsOption = 1,
        tracking_uri: TrackingOption = None,
    ) -> None:
        with mistakes(goes_on=True):
            from pipelines.config import SweepConfig
            from sweeps.runner import run_sweep

            config = SweepConfig(
                workspace=workspace.absolute(),
                store=store,
                study=study.name,
                folds=numbers(folds, "--folds"),
                variants=variants.split(",") if variants else None,
                train={"steps": steps, "minutes": minutes, "dim": dim}
                | of_recipe(recipe or "small", batch_scale, lr=lr)
                | ({"also": [str(path.absolute()) for path in also]} if also else {})
                | ({"workers": workers} if workers else {}),
                ways=numbers(ways, "--ways"),
                shots=numbers(shots, "--shots"),
                prompts=study.prompts,
                protocol=protocol,
                seeds=seeds,
                episodes=count,
                concurrent=concurrent,
                gpus=gpus,
                device=device,
                threads=threads,
                tracking_uri=tracking_uri,
            )
            result = run_sweep(config, console, command=shlex.join(["python", *sys.argv]))
            finish_sweep(result, tables_of(result))

    outline = (
        "Each variant is trained on each fold and evaluated on unseen classes. Killed and started again, the sweep "
        "goes on where it was; a variant that fails does not lose the others."
    )
    sweep_app.command(study.name, help=f"{study.about}\n\n{outline}")(command)


for each in STUDIES.values():
    add_study(each)


@sweep_app.command()
def search(
    trials: Annotated[int, typer.Option(min=1, help="Trials; with more, a search that ended goes on.")] = 30,
    fold: FoldOption = 0,
    presets: Annotated[str, typer.Option(help="Presets to choose from: paper, official, hybrid.")] = "paper,hybrid",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a trial that is not stopped early.")] = 2000,
    batch_scale: BatchScaleOption = 1.0,
    val_episodes: Annotated[int, typer.Option(min=1, help="Episodes of seen classes of each validation.")] = 200,
    also: AlsoOption = None,
    seed: Annotated[int, typer.Option(help="Of the sampler and of every training.")] = 0,
    concurrent: ConcurrentOption = None,
    address: AddressOption = None,
    gpus: GpusOption = None,
    workers: TrialWorkersOption = 0,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    threads: TrialThreadsOption = 1,
    tracking_uri: TrackingOption = None,
) -> None:
    """Search for settings: learning rate, weight decay, width, loss, mixture of prompts and preset.

    Optuna proposes each trial from what the earlier ones reached: mIoU on val photos of SEEN classes. The fold's unseen
    classes take no part, so `evaluate` may judge the winner on them. The first trials are the presets as they are; from
    the eleventh on, proposals follow the results.

    A training is validated six times. After the first and the third validation only the best third of the trials so far
    goes on (ASHA), so thirty trials cost about as much as ten to fifteen whole trainings. What starts slowly and ends
    well loses by it: give more --steps before more --trials.

    Killed and started again, the search goes on where it was. One trial at a time (--concurrent 1) makes the search
    itself reproducible; with several, proposals depend on which trial ends first.

    At the end: the trials, best first; which settings made the difference; and the best as a `train` command. In this
    workspace its training is finished already, so it returns at once and `evaluate` can follow. Repeat it with another
    --fold or more --steps.
    """
    with mistakes(goes_on=True):
        from pipelines.config import SearchConfig
        from sweeps.search.search_run import run_search

        config = SearchConfig(
            workspace=workspace.absolute(),
            store=store,
            also=[path.absolute() for path in also or ()],
            fold=fold,
            presets=presets.split(","),
            trials=trials,
            steps=steps,
            batch_scale=batch_scale,
            val_episodes=val_episodes,
            seed=seed,
            workers=workers,
            concurrent=concurrent,
            gpus=gpus,
            device=device,
            threads=threads,
            tracking_uri=tracking_uri,
        )
        result = run_search(config, console, command=shlex.join(["python", *sys.argv]))
        finish_sweep(result, result.tables, result.best_command and f"the best settings:\n{result.best_command}")


def finish_sweep(result, tables: list, after: str | None = None) -> None:
    """Print a sweep's tables and where they lie; exit code 1 where a trial failed."""
    for table in tables:
        console.print(table.rich())
    for trial, reason in result.failed.items():
        console.print(f"failed: {trial}: {reason.strip().splitlines()[-1]}", style="red", markup=False)
    if after:
        console.print(after, highlight=False, soft_wrap=True, markup=False)
    console.print(f"tables: {result.folder}", highlight=False, soft_wrap=True)
    console.print(f"compare the runs: python cli.py ui --workspace {result.config.workspace}", soft_wrap=True)
    if result.failed or result.interrupted:
        raise typer.Exit(1)


@app.command()
def report(
    out: Annotated[Path | None, typer.Option(help="The file to write; default: report.html in the workspace.")] = None,
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """One HTML file with the paper's tables beside what this workspace measured, plots, curves and a gallery.

    Nothing is run again. An empty cell says which command fills it.
    """
    with mistakes():
        from sweeps.report.page_of_tables import write_report

        path = write_report(workspace.absolute(), out or workspace.absolute() / "report.html")
        console.print(f"report: {path}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    workspace: Annotated[Path, typer.Option("--workspace", help="Folder of everything the demo makes.")] = Path(
        "demo-workspace"
    ),
    smallest: Annotated[
        bool, typer.Option("--smallest", help="Run the line in a minute; its scores say nothing.")
    ] = False,
    address: AddressOption = None,
) -> None:
    """The whole line on scenes drawn on the spot, without a download: about six minutes on two cores."""
    with mistakes(goes_on=True):
        from sweeps.demo import SMALLEST, run_demo

        result, pictures = run_demo(workspace.absolute(), console, SMALLEST if smallest else None)
        console.rule("done")
        for picture in pictures:
            console.print(f"picture: {picture}", highlight=False, soft_wrap=True)
        finish_sweep(result, tables_of(result))


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on localhost.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen at; only this machine by default.")] = "127.0.0.1",
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """Open the MLflow UI on this workspace."""
    with mistakes():
        from pipelines.tracking.mlflow_runs import serve_ui
        from pipelines.workspace import Workspace

        serve_ui(Workspace(workspace), host, port)
