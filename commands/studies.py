"""Many trainings and evaluations, and how their results are looked at."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from commands.options import AddressOption, console, mistakes, say, verb
from la.errors import InputError
from pipelines.config import SearchConfig, SweepConfig, WorkspaceSettings
from sweeps.study import BUILT_IN, Study, find_study, search_of, search_of_sweep

app = typer.Typer()
sweep_app = typer.Typer(help="Sweeps on Ray Tune: many trainings and evaluations, one table.", no_args_is_help=True)
# settings of training that are options; all others by --set
COMMON = ("steps", "minutes", "recipe", "lr", "batch_scale", "dim", "also", "workers")
OUTLINE = (
    "Each variant is trained on each fold and evaluated on unseen classes. Killed and started again, the sweep goes on "
    "where it was; a variant that fails does not lose the others. A setting that is given wins over what the study and "
    "its recipes say, for every variant."
)
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the trials, their number and hours, and end.")]
TEMPLATE = Path(__file__).parent / "study_template.toml"


def add_study(name: str) -> None:
    """The verb `sweep <study>`: all studies have the same options, with defaults of their own."""
    study = find_study(name)
    names = ", ".join(variant.name for variant in study.variants)

    @verb(
        sweep_app,
        SweepConfig,
        name=name,
        about=f"{study.about}\n\n{OUTLINE}\n\nVariants: {names}.",
        defaults={"study": name} | study.evaluation(),
        training=COMMON,
        from_file=True,
        trains=True,
        goes_on=True,
    )
    def command(
        config: SweepConfig, address: AddressOption = None, dry_run: DryRunOption = False, *, how: dict
    ) -> None:
        run_study(config, study, dry_run, **how)


for each in BUILT_IN:
    add_study(each)


def of_file(study: Path, **_: object) -> dict:
    """What a study's file says of folds, seeds and tasks."""
    return find_study(str(study)).evaluation() | {"study": str(study.absolute())}


@verb(sweep_app, SweepConfig, name="run", defaults=of_file, training=COMMON, from_file=True, trains=True, goes_on=True)
def run_file(
    config: SweepConfig,
    study: Annotated[Path, typer.Argument(help="A study: a .toml file, or a .py file whose study() returns the same.")],
    address: AddressOption = None,
    dry_run: DryRunOption = False,
    *,
    how: dict,
) -> None:
    """A study of your own: variants by name, grids, folds and seeds of training from one file. `sweep new` writes one.

    Options that are given win over the file.
    """
    run_study(config, find_study(str(study)), dry_run, **how)


@sweep_app.command()
def new(file: Annotated[Path, typer.Argument(help="The .toml file to write.")]) -> None:
    """Write a study with comments, to be changed: then `sweep run FILE`."""
    with mistakes():
        if file.exists():
            raise InputError(f"{file} is there already. Pass another name, or edit it.")
        file.write_text(TEMPLATE.read_text())
        say(f"study: {file}", f"look at its trials: python cli.py sweep run {shlex.quote(str(file))} --dry-run")


def run_study(config: SweepConfig, study: Study, dry_run: bool, **how: str | None) -> None:
    """Run a sweep or, of a study with a space, a search; or print what it would run. `how`: as of `run_sweep`."""
    if study.space:
        if how != {"code": "ask", "register": None}:
            raise InputError(f"{study.name} has a [space], so it is a search: without --again, --keep and --register.")
        run_searching(search_of_sweep(config, study), dry_run)
        return
    if dry_run:
        from sweeps.forecast import forecast

        table, lines = forecast(config, study, console)
        console.print(table)
        say(*lines)
        return
    from sweeps.paper_tables import tables_of
    from sweeps.runner import run_sweep

    result = run_sweep(config, console, command=shlex.join(["python", *sys.argv]), study=study, **how)
    finish_sweep(result, tables_of(result))


@verb(
    sweep_app,
    SearchConfig,
    defaults=lambda **_: search_of(find_study("search")),
    training=("batch_scale", "also", "workers", "preset"),
    from_file=True,
    goes_on=True,
)
def search(config: SearchConfig, address: AddressOption = None) -> None:
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
    --fold or more --steps. A setting that is given is not searched; a study with a [space] of its own is `sweep run`.
    """
    run_searching(config)


def run_searching(config: SearchConfig, dry_run: bool = False) -> None:
    """Run a search, print its table and the best as a command; or what it would draw from."""
    from sweeps.search.search_run import Search, run_search

    if dry_run:
        search = Search(config)
        say(f"{search.name}: {config.trials} trials of at most {config.steps} steps on fold {config.fold}, drawn from")
        say(*(f"  {name}: {space.model_dump(exclude_defaults=True)}" for name, space in config.spaces.items()))
        return
    result = run_search(config, console, command=shlex.join(["python", *sys.argv]))
    finish_sweep(result, result.tables, result.best_command and f"the best settings:\n{result.best_command}")


def finish_sweep(result, tables: list, after: str | None = None) -> None:
    """Print a sweep's tables and where they lie; exit code 1 where a trial failed."""
    for table in tables:
        console.print(table.rich())
    for trial, reason in result.failed.items():
        console.print(f"failed: {trial}: {reason.strip().splitlines()[-1]}", style="red", markup=False)
    say(
        *([after] if after else []),
        f"tables: {result.folder}",
        f"compare the runs: python cli.py ui --workspace {result.config.workspace}",
    )
    if result.failed or result.interrupted:
        raise typer.Exit(1)


@verb(app, WorkspaceSettings)
def report(
    config: WorkspaceSettings,
    out: Annotated[Path | None, typer.Option(help="The file to write; default: report.html in the workspace.")] = None,
) -> None:
    """One HTML file with the paper's tables beside what this workspace measured, plots, curves and a gallery.

    Nothing is run again. An empty cell says which command fills it.
    """
    from sweeps.report.page_of_tables import write_report

    say(f"report: {write_report(config.workspace, out or config.workspace / 'report.html')}")


@verb(app, WorkspaceSettings, defaults={"workspace": Path("demo-workspace")}, goes_on=True)
def demo(
    config: WorkspaceSettings,
    smallest: Annotated[
        bool, typer.Option("--smallest", help="Run the line in a minute; its scores say nothing.")
    ] = False,
    address: AddressOption = None,
) -> None:
    """The whole line on scenes drawn on the spot, without a download: about six minutes on two cores."""
    from sweeps.demo import SMALLEST, run_demo
    from sweeps.paper_tables import tables_of

    result, pictures = run_demo(config.workspace, console, SMALLEST if smallest else None)
    console.rule("done")
    say(*(f"picture: {picture}" for picture in pictures))
    finish_sweep(result, tables_of(result))


@verb(app, WorkspaceSettings)
def ui(
    config: WorkspaceSettings,
    port: Annotated[int, typer.Option(help="Port on localhost.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen at; only this machine by default.")] = "127.0.0.1",
) -> None:
    """Open the MLflow UI on this workspace."""
    from pipelines.tracking.mlflow_runs import serve_ui
    from pipelines.workspace import Workspace

    serve_ui(Workspace(config.workspace), host, port)
