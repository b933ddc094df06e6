"""The plan's predictions beside what really happened.

`python -m tools.plan_check run --coco-dir coco` makes a small real run now,
`python -m tools.plan_check past --workspace DIR` takes one that a workspace recorded. Exit code 1 beyond 25 percent.
"""

import time
from functools import partial
from typing import Annotated, Literal

import typer
from rich.table import Table

from commands.options import console, verb
from pipelines.config import FeaturizeConfig, PlanConfig, StoreSettings, TrainConfig
from tools.plan_check.rehearsal import Compared, check_workspace, rehearse

app = typer.Typer(help=__doc__)
BAR = 25  # percent that a prediction may be off


@verb(app, PlanConfig, without=("workers", "nodes", "ram_gb", "folds", "seeds", "episodes"), defaults={"photos": 322})
def run(
    config: PlanConfig,
    clock: Annotated[Literal["wall", "cpu"], typer.Option(help="cpu: right on a busy machine.")] = "wall",
) -> None:
    """Featurize, train and evaluate on some photos, and compare."""
    shared = {"device": config.device, "threads": config.threads}
    how = config.model_dump(include={"preset", "recipe", "batch_scale", "steps"}, exclude_none=True)
    training = TrainConfig(**how, **shared)
    vit = {"backbone": config.backbone, "image_size": config.image_size, "weights": config.weights}
    featurizing = FeaturizeConfig(coco_dir=config.coco_dir, **vit, **shared)
    seconds = time.perf_counter if clock == "wall" else time.process_time
    show(rehearse(featurizing, training, config.photos, seconds, partial(console.print, style="dim")))


@verb(app, StoreSettings)
def past(config: StoreSettings) -> None:
    """Compare with the trainings that a workspace recorded."""
    show(check_workspace(config.workspace, config.store))


def show(compared: list[Compared]) -> None:
    """Predicted beside measured; exit code 1 where one is off by more than BAR percent."""
    table = Table("what", "predicted", "measured", "unit", "error")
    for one in compared:
        table.add_row(one.name, f"{one.predicted:.4g}", f"{one.measured:.4g}", one.unit, f"{one.error:+.1f} %")
    console.print(table)
    worst = max(compared, key=lambda one: abs(one.error))
    passed = abs(worst.error) <= BAR
    console.print(
        f"{'within' if passed else 'NOT within'} {BAR} %: the largest error is {worst.error:+.1f} % ({worst.name})"
    )
    if not passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
