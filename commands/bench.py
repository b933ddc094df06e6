"""Speed as a ratio, both sides measured in one run."""

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from commands.options import console, say, verb
from la.errors import InputError
from pipelines.config import BenchConfig

app = typer.Typer()
ABOUT = """Speed as a ratio, both sides measured in one run: each stage against a plain way of doing it, or a limit.

featurize: against the bare backbone on decoded photos; asks for --coco-dir
store: a photo's features at random against a memory map; an int8 store beside it, too
episodes: drawn on one core, per second
data: batches of episodes against copying their features
model: annotated pairs packed against the dense grid; the memory of 1 and of 20 shots
evaluate: against one episode at a time
training: Ray Train with one worker against the bare loop, and two against one
operators: of a training step, against what they were
sweep: what a trial costs beyond its own work
predict: the heads against the backbone, for one query

Without a name all are measured, in a quarter of an hour, into one table and a JSON file. Exit code 1 where one misses
its bar.
"""


@verb(app, BenchConfig, name="bench", about=ABOUT)
def bench(
    config: BenchConfig,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="What to measure; default: all.")
    ] = None,
) -> None:
    """See ABOUT, which is the help."""
    from pipelines.bench import ratios
    from pipelines.workspace import write_text
    from sweeps.measurements import measurements

    runs = measurements(config)
    unknown = [name for name in names or () if name not in runs]
    if unknown:
        raise InputError(f"{unknown[0]} is not measured here. Choose from {', '.join(runs)}.")
    table = Table("measurement", "ratio", "bar", "", title="Speed, each ratio measured in one run")
    kept: dict[str, list] = {}
    for name in names or runs:
        say(f"{time.strftime('%T')} {name}")
        try:
            results = list(runs[name]())
        except InputError as error:  # the others are worth having
            if names:
                raise
            table.add_row(name, "-", "-", f"not run: {error}")
            continue
        kept[name] = [asdict(result) | {"passed": result.passed} for result in results]
        for result in results:
            say(str(result))
            verdict = "passed" if result.passed else "FAILED"
            table.add_row(result.name, f"{result.ratio:.3f}", f"{result.sense} {result.bar:g}", verdict)
    if not names:
        about, file = ratios.machine(), config.out or config.workspace / "artifacts" / "bench.json"
        write_text(file, json.dumps({"machine": about, "at": time.strftime("%FT%T%z"), "results": kept}, indent=1))
        console.print(table)
        say(", ".join(f"{key} {value}" for key, value in about.items()), f"figures: {file}")
    if not all(result["passed"] for results in kept.values() for result in results):
        raise typer.Exit(1)
