"""The plan's predictions beside what really happened.

`python -m tools.plan_check run --coco-dir coco` makes a small real run now,
`python -m tools.plan_check past WORKSPACE` takes one that a workspace recorded. Exit code 1 beyond 25 percent.
"""

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from commands.options import (
    BackboneOption,
    BatchScaleOption,
    DeviceOption,
    RecipeOption,
    SizeOption,
    StoreOption,
    ThreadsOption,
    WeightsOption,
    console,
    mistakes,
    of_recipe,
)
from pipelines.config import FeaturizeConfig, TrainConfig, default_recipe
from tools.plan_check.rehearsal import Compared, check_workspace, rehearse

app = typer.Typer(help=__doc__)
BAR = 25  # percent that a prediction may be off


@app.command()
def run(
    coco_dir: Annotated[Path, typer.Option(help="Folder with annotations/ and photos.")],
    weights: WeightsOption = None,
    backbone: BackboneOption = "vit_base_patch16_224.mae",
    image_size: SizeOption = 480,
    photos: Annotated[int, typer.Option(min=30, help="Photos to take, at most.")] = 322,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 2000,
    preset: Annotated[str, typer.Option(help="paper, official, hybrid or debug.")] = "paper",
    recipe: RecipeOption = None,
    batch_scale: BatchScaleOption = 1.0,
    clock: Annotated[Literal["wall", "cpu"], typer.Option(help="cpu: right on a busy machine.")] = "wall",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Featurize, train and evaluate on some photos, and compare."""
    with mistakes():
        training = TrainConfig(
            workspace=Path("unused"),
            preset=preset,
            **of_recipe(recipe or default_recipe(preset), batch_scale),
            steps=steps,
            device=device,
            threads=threads,
        )
        featurizing = FeaturizeConfig(
            workspace=Path("unused"),
            coco_dir=coco_dir,
            backbone=backbone,
            weights=weights,
            image_size=image_size,
            device=device,
            threads=threads,
        )
        seconds = time.perf_counter if clock == "wall" else time.process_time
        show(rehearse(featurizing, training, photos, seconds, partial(console.print, style="dim")))


@app.command()
def past(workspace: Path, store: StoreOption = None) -> None:
    """Compare with the trainings that a workspace recorded."""
    with mistakes():
        show(check_workspace(workspace, store))


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
