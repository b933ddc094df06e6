"""One model: training, evaluation, cost, and the released format."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from commands.options import AddressOption, console, mistakes, progress_bar, say, verb
from la.errors import InputError
from pipelines.config import EvaluateConfig, ProfileConfig, TrainConfig, WorkspaceSettings

app = typer.Typer()


@verb(app, TrainConfig, from_file=True, trains=True, goes_on=True)
def train(
    config: TrainConfig,
    epochs: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Optimisation", help="Instead of --steps; one is as many episodes as training photos."
        ),
    ] = None,
    address: AddressOption = None,
    *,
    how: dict,
) -> None:
    """Train the heads on the 60 seen classes of a fold. Killed and started again, it goes on from the last checkpoint.

    On Ctrl-C, SIGTERM or SIGUSR1 (Slurm, spot instances) it writes one after the step under way and ends with exit code
    130, 143 or 138; of the workers, send it to this process.
    """
    from pipelines.tracking.job_runs import tracked_training
    from pipelines.training.prepare import steps_of_epochs

    if epochs is not None:
        config = config.model_copy(update={"steps": steps_of_epochs(config, epochs)})
    with progress_bar("numbers") as bar:
        task = bar.add_task(f"fold {config.fold}", total=config.steps, numbers="starting")
        seen = ""

        def show(report: dict) -> None:
            nonlocal seen
            seen = f", seen mIoU {report['seen_miou']:.1f}" if "seen_miou" in report else seen
            numbers = f"loss {report['loss']:.3f}{seen}, {report['episodes_per_s']:.1f} episodes/s"
            bar.update(task, completed=report["step"], numbers=numbers)
            if "seen_miou" in report:
                spent = f"{report['seconds'] / 60:.1f} minutes"
                bar.console.print(f"step {report['step']}: {numbers}, {spent}", highlight=False)

        result = tracked_training(config, show, **how)
        bar.update(task, completed=result.step)
    seen, minutes = result.metrics["seen_miou"], result.metrics["train_seconds"] / 60
    say(
        f"step {result.step}: best mIoU on seen classes {seen:.1f}, {minutes:.1f} minutes",
        f"checkpoint: {result.checkpoint}",
    )


@verb(app, EvaluateConfig, from_file=True)
def evaluate(
    config: EvaluateConfig,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the first episode of each seed: supports, query, truth, prediction.")
    ] = None,
) -> None:
    """mIoU over the fold's classes, several seeds with mean and standard deviation, and each class's IoU."""
    from pipelines.evaluation.evaluate import evaluate as run
    from pipelines.evaluation.methods import with_checkpoint
    from pipelines.tracking.job_runs import log_evaluation

    chosen = with_checkpoint(config)
    if chosen != config:
        say(f"checkpoint: {chosen.checkpoint}, the newest finished run of this fold")
    config = chosen
    with progress_bar("now") as bar:
        task = bar.add_task(f"fold {config.fold} {config.method}", total=None, now="loading the model")
        result = run(config, lambda done, total: bar.update(task, completed=done, total=total, now="episodes"))
    log_evaluation(config, result)
    table = Table("class", "IoU", "episodes", title=result.title(config))
    for name, iou in sorted(result.per_class.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{iou:.1f}", str(result.episodes_per_class[name]))
    console.print(table)
    say(*(f"  not drawn: {name} ({reason})" for name, reason in result.classes_skipped.items()), result.summary(config))
    if picture:
        from pipelines.evaluation.figures import draw_first_episodes

        draw_first_episodes(picture, [(config, s) for s in range(config.seeds)])
        say(f"picture: {picture}")


@verb(app, ProfileConfig)
def profile(config: ProfileConfig) -> None:
    """Seconds and peak memory of 5-way inference as shots grow: table 2 of the paper, each cell in a fresh process."""
    from pipelines.evaluation.profile import run_profile

    with progress_bar() as bar:
        task = bar.add_task("profile", total=None)
        result = run_profile(config, lambda done, total, _: bar.update(task, completed=done, total=total))
    console.print(result.table())
    say(*result.notes(), *result.summary(), f"figures: {result.file}")


@app.command()
def model(
    preset: Annotated[str, typer.Option(help="paper, official, hybrid or debug.")] = "paper",
    channels: Annotated[int, typer.Option(help="Channels of the backbone; 768 for ViT-B.")] = 768,
) -> None:
    """Print the learnable parameters of a preset, part by part."""
    with mistakes():
        from la.model.label_anything import build
        from la.model.label_anything import preset as config_of

        parts = build(config_of(preset, channels=channels)).parameter_table()
        table = Table("part", "parameters", title=f"{preset}, {channels} backbone channels")
        for name, size in parts.items():
            table.add_row(name, f"{size:,}")
        table.add_section()
        table.add_row("all", f"{sum(parts.values()):,}")
        console.print(table)


@verb(app, WorkspaceSettings)
def import_official(
    config: WorkspaceSettings,
    source: Annotated[str, typer.Argument(help="A .safetensors or .pt file, or hf://owner/name.")],
    fold: Annotated[int, typer.Option(help="The COCO-20i fold that it was not trained on.")],
    out: Annotated[Path | None, typer.Option(help="Where to; default: a folder in the workspace's runs.")] = None,
    absent_pairs: Annotated[
        bool, typer.Option(help="Let absent pairs into the mixer, as released checkpoints were trained; slower.")
    ] = True,
) -> None:
    """Turn a checkpoint of the official implementation into one that evaluate takes."""
    from la.data.folds import FOLDS
    from pipelines.runs.official_files import import_official as run
    from pipelines.workspace import Workspace

    if fold not in range(FOLDS):
        raise InputError(f"--fold is {fold}; expected 0 to {FOLDS - 1}.")
    out = out or Workspace(config.workspace).runs / f"official-{Path(source).stem}-fold{fold}" / "best.pt"
    model = run(source, fold, out, absent_pairs)
    parts = ("token_pool", "class_example_mixer", "spatial_convs")
    say(
        f"{sum(model.parameter_table().values()):,} parameters, {model.config.channels} backbone channels",
        ", ".join(f"{part}: {'yes' if getattr(model.config, part) else 'no'}" for part in parts),
        f"checkpoint: {out}",
    )


@app.command("export-official")
def export_official(
    checkpoint: Annotated[Path, typer.Argument(help="A run's best.pt, of the official preset.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Write a checkpoint under the parameter names of the official implementation."""
    with mistakes():
        from pipelines.runs.official_files import export_official as run

        run(checkpoint, out)
        say(f"weights: {out}")
