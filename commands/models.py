"""One model: training, evaluation, cost, and the released format."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from commands.options import (
    WORKSPACE,
    AddressOption,
    AlsoOption,
    BatchScaleOption,
    DeviceOption,
    FoldOption,
    LrOption,
    PromptOption,
    ProtocolEpisodesOption,
    ProtocolOption,
    ProtocolSeedsOption,
    RecipeOption,
    ShotsOption,
    StoreOption,
    SupportsOption,
    ThreadsOption,
    WaysOption,
    WeightsOption,
    WorkspaceOption,
    console,
    mistakes,
    numbers,
    of_recipe,
    progress_bar,
)
from la.errors import InputError

app = typer.Typer()


@app.command()
def train(
    fold: FoldOption = 0,
    workers: Annotated[int, typer.Option(min=0, help="Ray Train workers; 0 trains in this process.")] = 0,
    address: AddressOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimisation steps.")] = 2000,
    epochs: Annotated[
        float | None, typer.Option(help="Instead of --steps; one epoch is as many episodes as training photos.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop at the first checkpoint after this long.")] = None,
    recipe: RecipeOption = None,
    lr: LrOption = None,
    batch_scale: BatchScaleOption = 1.0,
    val_every: Annotated[int, typer.Option(min=1, help="Steps between validations on seen classes.")] = 250,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints: what a kill can lose.")
    ] = 100,
    preset: Annotated[
        str, typer.Option(help="paper (1.4 M parameters), official (10.1 M), hybrid (matching maps) or debug (tiny).")
    ] = "paper",
    dim: Annotated[int | None, typer.Option(help="D, channels after the neck; default the preset's.")] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Rounds of attention, or the hybrid's layers; default the preset's.")
    ] = None,
    token_pool: Annotated[bool, typer.Option(help="The token pool (paper, official).")] = True,
    mixer: Annotated[bool, typer.Option(help="The class-example mixer (paper, official).")] = True,
    spatial_convs: Annotated[bool, typer.Option(help="The decoder's spatial convolutions.")] = True,
    match_prototypes: Annotated[bool, typer.Option(help="Cosines to prototypes (hybrid).")] = True,
    match_affinity: Annotated[bool, typer.Option(help="Affinity to all support tokens (hybrid).")] = True,
    object_metric: Annotated[bool, typer.Option(help="Matching in a metric fitted to objects (hybrid).")] = True,
    objectness: Annotated[
        int | None, typer.Option(min=0, help="Channels of the query that all classes share (hybrid).")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="Of AdamW; default: the recipe's.")] = None,
    loss: Annotated[
        Literal["focal", "iou"] | None,
        typer.Option(help="What is minimised; default: the recipe's."),
    ] = None,
    prompts: Annotated[str, typer.Option(help="Kinds of prompt that training episodes mix.")] = "mask,point,box",
    warmup_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of rising learning rate; default: the recipe's.")
    ] = None,
    class_weights: Annotated[
        Literal["inverse", "log", "log_batch", "none"] | None,
        typer.Option(help="How the loss weighs a class by its share of pixels; default: the recipe's."),
    ] = None,
    val_episodes: Annotated[
        int, typer.Option(min=1, help="Episodes of seen classes that choose the checkpoint.")
    ] = 100,
    fold_lists: Annotated[
        Literal["interleaved", "contiguous"],
        typer.Option(help="Which quarter of the classes a fold is; protocol panet needs contiguous."),
    ] = "interleaved",
    classes: Annotated[
        Literal["seen", "all"], typer.Option(help="all: train on the fold's test classes too, as in table 4.")
    ] = "seen",
    also: AlsoOption = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and training episodes.")] = 0,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile; pays on long runs on a GPU.")] = False,
) -> None:
    """Train LA on the 60 seen classes of a fold. Killed and started again, it goes on from the last checkpoint.

    On Ctrl-C, SIGTERM or SIGUSR1 (Slurm, spot instances) it writes one after the step under way and ends with exit code
    130, 143 or 138; of the workers, send it to this process.
    """
    with mistakes(goes_on=True):
        from pipelines.config import TrainConfig, default_recipe
        from pipelines.tracking.mlflow_runs import log_training
        from pipelines.training.prepare import steps_of_epochs
        from pipelines.training.run import train as run

        config = TrainConfig(
            workspace=workspace.absolute(),
            store=store,
            fold=fold,
            fold_lists=fold_lists,
            classes=classes,
            also=[path.absolute() for path in also or ()],
            workers=workers,
            steps=steps,
            minutes=minutes,
            **of_recipe(
                recipe or default_recipe(preset),
                batch_scale,
                lr=lr,
                weight_decay=weight_decay,
                loss=loss,
                class_weights=class_weights,
                warmup_steps=warmup_steps,
            ),
            prompts=tuple(prompts.split(",")),
            val_every=val_every,
            checkpoint_every=checkpoint_every,
            preset=preset,
            dim=dim,
            depth=depth,
            token_pool=token_pool,
            class_example_mixer=mixer,
            spatial_convs=spatial_convs,
            match_prototypes=match_prototypes,
            match_affinity=match_affinity,
            object_metric=object_metric,
            objectness=objectness,
            val_episodes=val_episodes,
            seed=seed,
            device=device,
            threads=threads,
            compile=compile,
        )
        if epochs is not None:
            config = config.model_copy(update={"steps": steps_of_epochs(config, epochs)})
        with progress_bar("numbers") as bar:
            task = bar.add_task(f"fold {fold}", total=config.steps, numbers="starting")
            seen = ""

            def show(report: dict) -> None:
                nonlocal seen
                seen = f", seen mIoU {report['seen_miou']:.1f}" if "seen_miou" in report else seen
                numbers = f"loss {report['loss']:.3f}{seen}, {report['episodes_per_s']:.1f} episodes/s"
                bar.update(task, completed=report["step"], numbers=numbers)
                if "seen_miou" in report:
                    spent = f"{report['seconds'] / 60:.1f} minutes"
                    bar.console.print(f"step {report['step']}: {numbers}, {spent}", highlight=False)

            result = run(config, show)
            bar.update(task, completed=result.step)
        log_training(config, result)
        console.print(
            f"step {result.step}: best mIoU on seen classes {result.metrics['seen_miou']:.1f}, "
            f"{result.metrics['train_seconds'] / 60:.1f} minutes"
        )
        console.print(f"checkpoint: {result.checkpoint}", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    fold: FoldOption = 0,
    method: Annotated[str, typer.Option(help="la, or without training: prototype, parts, affinity or ridge.")] = "la",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A run's folder or checkpoint; default: the newest finished run of the fold.")
    ] = None,
    ways: WaysOption = 1,
    shots: ShotsOption = 1,
    prompt: PromptOption = "mask",
    supports: SupportsOption = "fixed",
    support_selection: Annotated[
        Literal["random", "nearest"],
        typer.Option(help="nearest: of each class the photos most like the query, by their features."),
    ] = "random",
    protocol: ProtocolOption = "la",
    seeds: ProtocolSeedsOption = None,
    count: ProtocolEpisodesOption = None,
    classes: Annotated[Literal["unseen", "seen"], typer.Option(help="Which classes of the fold.")] = "unseen",
    split: Annotated[Literal["val", "train"], typer.Option(help="Which photos.")] = "val",
    pool_draws: Annotated[
        int, typer.Option(min=0, help="Mean over so many draws of the token-pool rows; 0: fixed rows.")
    ] = 0,
    flips: Annotated[bool, typer.Option("--flips", help="Mean with the query's features flipped.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the first episode of each seed: supports, query, truth, prediction.")
    ] = None,
    gallery: Annotated[Path | None, typer.Option(help="Draw the best, median and worst episodes, as JPEG.")] = None,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """mIoU over the fold's classes, several seeds with mean and standard deviation, and each class's IoU."""
    with mistakes():
        from pipelines.config import EvaluateConfig
        from pipelines.evaluation.evaluate import evaluate as run
        from pipelines.tracking.mlflow_runs import log_evaluation

        config = EvaluateConfig(
            workspace=workspace.absolute(),
            store=store,
            method=method,
            checkpoint=checkpoint,
            fold=fold,
            ways=ways,
            shots=shots,
            prompt=prompt,
            supports=supports,
            support_selection=support_selection,
            seeds=seeds,
            episodes=count,
            classes=classes,
            split=split,
            protocol=protocol,
            pool_draws=pool_draws,
            flips=flips,
            gallery=gallery,
            device=device,
            threads=threads,
        )
        if method == "la" and checkpoint is None:
            from pipelines.evaluation.methods import latest_run
            from pipelines.store.reader import FeatureStore
            from pipelines.workspace import Workspace

            latest = latest_run(config, FeatureStore(Workspace(config.workspace).find_store(store)))
            config = config.model_copy(update={"checkpoint": latest})  # for the record too: others may be finished soon
            console.print(
                f"checkpoint: {latest}, the newest finished run of this fold", highlight=False, soft_wrap=True
            )
        with progress_bar("now") as bar:
            task = bar.add_task(f"fold {fold} {method}", total=None, now="loading the model")
            result = run(config, lambda done, total: bar.update(task, completed=done, total=total, now="episodes"))
        log_evaluation(config, result)
        table = Table("class", "IoU", "episodes", title=f"{result.method}, fold {fold}, {classes} classes of {split}")
        for name, iou in sorted(result.per_class.items(), key=lambda item: -item[1]):
            table.add_row(name, f"{iou:.1f}", str(result.episodes_per_class[name]))
        console.print(table)
        for name, reason in result.classes_skipped.items():
            console.print(f"  not drawn: {name} ({reason})", highlight=False)
        spread = f" +- {result.std:.2f}" if config.seeds > 1 else ""
        console.print(
            f"{ways}-way {shots}-shot, {prompt} prompts: mIoU {result.miou:.2f}{spread} over "
            f"{config.seeds} seeds x {config.episodes} episodes, {result.classes_drawn} classes; "
            f"95 % of resampled episodes {result.interval[0]:.2f} to {result.interval[1]:.2f}, "
            f"FB-IoU {result.fb_iou:.2f}; protocol {protocol}, episodes {result.episodes_digest}",
            highlight=False,
        )
        if picture:
            from pipelines.evaluation.figures import draw_first_episodes

            draw_first_episodes(picture, [(config, s) for s in range(config.seeds)])
            console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


@app.command()
def profile(
    shots: Annotated[str, typer.Option(help="Support images of each class, such as 1,2,5,10.")] = "1,2,5,10",
    methods: Annotated[
        str, typer.Option(help="Some of la, hybrid, affinity (dense, as in DCAMA), prototype, parts, ridge.")
    ] = "la,hybrid,affinity",
    preset: Annotated[str, typer.Option(help="LA of random weights: paper, official or debug.")] = "official",
    checkpoint: Annotated[Path | None, typer.Option(help="A run's folder or checkpoint, in place of --preset.")] = None,
    fold: FoldOption = 0,
    backbone: Annotated[bool, typer.Option(help="Measure from photos as well, through the store's ViT.")] = True,
    weights: WeightsOption = None,
    at_once: Annotated[
        int, typer.Option("--supports-at-once", min=1, help="Of LA and the ViT; more take more memory.")
    ] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each cell; the median counts.")] = 5,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Seconds and peak memory of 5-way inference as shots grow: table 2 of the paper, each cell in a fresh process."""
    with mistakes():
        from pipelines.evaluation.profile import run_profile

        with progress_bar() as bar:
            task = bar.add_task("profile", total=None)
            result = run_profile(
                workspace.absolute(),
                numbers(shots, "--shots"),
                methods.split(","),
                backbone,
                lambda done, total, _: bar.update(task, completed=done, total=total),
                preset=preset,
                checkpoint=checkpoint and checkpoint.absolute(),
                weights=weights and weights.absolute(),
                fold=fold,
                repeats=repeats,
                supports_at_once=at_once,
                store=store,
                device=device,
                threads=threads,
            )
        console.print(result.table())
        for line in (*result.notes(), *result.summary()):
            console.print(line, highlight=False, markup=False)
        console.print(f"figures: {result.file}", highlight=False, soft_wrap=True)


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


@app.command("import-official")
def import_official(
    source: Annotated[str, typer.Argument(help="A .safetensors or .pt file, or hf://owner/name.")],
    fold: Annotated[int, typer.Option(help="The COCO-20i fold that it was not trained on.")],
    out: Annotated[Path | None, typer.Option(help="Where to; default: a folder in the workspace's runs.")] = None,
    absent_pairs: Annotated[
        bool, typer.Option(help="Let absent pairs into the mixer, as released checkpoints were trained; slower.")
    ] = True,
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """Turn a checkpoint of the official implementation into one that evaluate takes."""
    with mistakes():
        from la.data.folds import FOLDS
        from pipelines.runs.official_files import import_official as run
        from pipelines.workspace import Workspace

        if fold not in range(FOLDS):
            raise InputError(f"--fold is {fold}; expected 0 to {FOLDS - 1}.")
        out = out or Workspace(workspace).runs / f"official-{Path(source).stem}-fold{fold}" / "best.pt"
        model = run(source, fold, out, absent_pairs)
        config = model.config
        parts = ("token_pool", "class_example_mixer", "spatial_convs")
        console.print(f"{sum(model.parameter_table().values()):,} parameters, {config.channels} backbone channels")
        console.print(", ".join(f"{part}: {'yes' if getattr(config, part) else 'no'}" for part in parts))
        console.print(f"checkpoint: {out}", highlight=False, soft_wrap=True)


@app.command("export-official")
def export_official(
    checkpoint: Annotated[Path, typer.Argument(help="A run's best.pt, of the official preset.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Write a checkpoint under the parameter names of the official implementation."""
    with mistakes():
        from pipelines.runs.official_files import export_official as run

        run(checkpoint, out)
        console.print(f"weights: {out}", highlight=False, soft_wrap=True)
