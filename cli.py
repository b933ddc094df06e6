"""Label Anything from the shell: one verb per stage, from a COCO folder to tables in MLflow.

featurize, episodes, train, evaluate: one model.  featurize, sweep ablations, ui: the paper's ablation tables.
demo: all of it on scenes drawn on the spot, without a download.
"""

import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from la.errors import InputError
from sweeps.studies import STUDIES
from sweeps.study import Study

console = Console()
app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_show_locals=False, add_completion=False)
sweep_app = typer.Typer(help="Sweeps on Ray Tune: many trainings and evaluations, one table.", no_args_is_help=True)
bench_app = typer.Typer(help="Speed as a ratio, both sides measured in one run.", no_args_is_help=True)
app.add_typer(sweep_app, name="sweep")
app.add_typer(bench_app, name="bench")

WORKSPACE = Path("workspace")
WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", envvar="LA_WORKSPACE", help="Folder of everything a study makes.")
]
StoreOption = Annotated[str | None, typer.Option("--store", help="Key of the feature store, if there are several.")]
FoldOption = Annotated[int, typer.Option("--fold", help="COCO-20i fold, 0 to 3; its 20 classes stay unseen.")]
FoldsOption = Annotated[str, typer.Option("--folds", help="COCO-20i folds, such as 0 or 0,1,2,3.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1; auto takes CUDA if there.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Torch threads of each process.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Pairs of passes; the median counts.")]
AlsoOption = Annotated[
    list[Path] | None,
    typer.Option(help="Workspace of another folder, featurized alike, to train on as well; may be given repeatedly."),
]
WaysOption = Annotated[int, typer.Option("--ways", min=1, help="Classes of an episode.")]
ShotsOption = Annotated[int, typer.Option("--shots", min=1, help="Support images of each class.")]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="Sets of episodes; mean and std are over them.")]
EpisodesOption = Annotated[int, typer.Option("--episodes", min=1, help="Episodes of each seed.")]
CocoOption = Annotated[Path, typer.Option("--coco-dir", help="Folder with annotations/, train2017/ and val2017/.")]
BackboneOption = Annotated[str, typer.Option("--backbone", help="Any ViT of timm.")]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="Local weights in timm's names; default: timm's hub.")
]
SizeOption = Annotated[int, typer.Option("--image-size", help="Side in pixels that photos are resized to.")]
BatchScaleOption = Annotated[
    float, typer.Option("--batch-scale", help="Times B in the recipe's (B, N, K); 0.5 halves memory and time.")
]
RecipeOption = Annotated[
    Literal["small", "paper", "official", "hybrid"] | None,
    typer.Option(
        help="Training settings that belong together: for a few hundred photos (the default; of the hybrid preset, its "
        "own), the paper's, the released."
    ),
]
LrOption = Annotated[float | None, typer.Option(help="Learning rate after warm-up; default: the recipe's.")]
PromptOption = Annotated[
    Literal["mask", "point", "box", "point_box", "mixed"],
    typer.Option(help="Prompts on the supports; mixed: each instance a mask, points or a box."),
]
ProtocolOption = Annotated[
    Literal["la", "hsnet", "pfenet", "panet", "large"],
    typer.Option(help="How episodes are drawn and scored; numbers compare within one."),
]
ProtocolSeedsOption = Annotated[
    int | None, typer.Option("--seeds", min=1, help="Sets of episodes; default: the protocol's.")
]
ProtocolEpisodesOption = Annotated[
    int | None, typer.Option("--episodes", min=1, help="Of each seed; default: the protocol's.")
]
SupportsOption = Annotated[
    Literal["fixed", "varied"],
    typer.Option(help="K shots of every class, or 1 to K, where a photo of several classes counts for each."),
]


@contextmanager
def mistakes():
    """The user's mistakes are one message and exit code 2."""
    try:
        yield
    except (InputError, ValidationError) as error:
        told = str(error) if isinstance(error, InputError) else wrong_setting(error)
        Console(stderr=True).print("error:", told, style="red", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was")
        raise typer.Exit(130) from None


def wrong_setting(error: ValidationError) -> str:
    """A setting that its model refuses, by the flag's name."""
    first = error.errors()[0]
    flag = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "settings"
    return f"{flag} is {first['input']!r}: {first['msg']}."


def progress_bar(*fields: str) -> Progress:
    """A bar with the count, the task fields named, and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, *(TextColumn("{task.fields[" + f + "]}") for f in fields), TimeRemainingColumn(), console=console
    )


@app.command()
def featurize(
    coco_dir: CocoOption,
    backbone: BackboneOption = "vit_base_patch16_224.mae",
    weights: WeightsOption = None,
    image_size: SizeOption = 480,
    workers: Annotated[int, typer.Option(min=0, help="Ray Data workers; 0 works in this process.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos at once through the ViT.")] = 8,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out photos that cannot be read.")] = False,
    train_split: Annotated[str | None, typer.Option(help="Such as train2014; default: the newest there.")] = None,
    val_split: Annotated[str | None, typer.Option(help="Such as val2014; default: the newest there.")] = None,
    workspace: WorkspaceOption = WORKSPACE,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Turn every photo into features once, with a frozen ViT. Done twice, there is nothing to do."""
    with mistakes():
        from pipelines.config import FeaturizeConfig
        from pipelines.featurize import featurize as run

        report = run(
            FeaturizeConfig(
                workspace=workspace,
                coco_dir=coco_dir,
                backbone=backbone,
                weights=weights,
                image_size=image_size,
                workers=workers,
                batch_size=batch_size,
                skip_bad=skip_bad,
                train_split=train_split,
                val_split=val_split,
                device=device,
                threads=threads,
            ),
            console,
        )
        rate = f" at {report.images_per_second:.2f} images/s" if report.made else ""
        console.print(
            f"{report.made} photos featurized{rate}, {report.already} there already, {len(report.skipped)} skipped"
        )
        for name, reason in report.skipped.items():
            console.print(f"  skipped {name}: {reason}", highlight=False, markup=False)
        console.print(f"store: {report.store}", highlight=False, soft_wrap=True)


@app.command()
def episodes(
    folds: FoldsOption = "0,1,2,3",
    train_batches: Annotated[int, typer.Option(min=1, help="Training batches of each fold.")] = 4000,
    ways: Annotated[str, typer.Option(help="Ways of the test episodes, such as 1,2.")] = "1,2",
    shots: Annotated[str, typer.Option(help="Shots of the test episodes, such as 1,5.")] = "1",
    prompt: PromptOption = "mask",
    supports: SupportsOption = "fixed",
    seeds: SeedsOption = 5,
    count: EpisodesOption = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the training episodes.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw; the episodes are the same.")] = 0,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Draw COCO-20i episodes into Parquet shards. Later verbs draw what they miss, so this one is for looking first."""
    with mistakes():
        from pipelines.config import EvaluateConfig, TrainConfig
        from pipelines.episodes import ensure_episodes, evaluation_plan, training_plan
        from pipelines.store import FeatureStore
        from pipelines.workspace import Workspace

        features = FeatureStore(Workspace(workspace).find_store(store))
        plans = []
        for fold in numbers(folds, "--folds"):
            trained = TrainConfig(workspace=workspace, fold=fold, seed=seed, train_batches=train_batches)
            plans.append(training_plan(trained))
            for n in numbers(ways, "--ways"):
                for k in numbers(shots, "--shots"):
                    tested = EvaluateConfig(
                        workspace=workspace,
                        fold=fold,
                        ways=n,
                        shots=k,
                        prompt=prompt,
                        supports=supports,
                        episodes=count,
                    )
                    plans += [evaluation_plan(tested, s) for s in range(seeds)]
        table = Table("fold", "for", "classes", "ways", "shots", "seed", "episodes", "drawn", "skipped", "digest")
        reasons: dict[str, str] = {}
        with progress_bar() as bar:
            task = bar.add_task("episode sets", total=len(plans))
            for plan in plans:
                manifest = ensure_episodes(plan, features, workers).manifest
                names = features.dataset(plan.split).categories
                for category, reason in manifest["classes_skipped"].items():
                    where = f"fold {plan.fold} {plan.split} {plan.classes}"
                    reasons[f"{where}: {names[int(category)]}"] = reason
                mixed = plan.prompt is None
                table.add_row(
                    str(plan.fold),
                    "training" if mixed else "testing",
                    plan.classes,
                    "mixed" if mixed else str(plan.batches[0][1]),
                    "mixed" if mixed else str(plan.batches[0][2]),
                    str(plan.seed),
                    str(manifest["episodes"]),
                    str(len(manifest["classes_drawn"])),
                    str(len(manifest["classes_skipped"])),
                    manifest["digest"][:8],
                )
                bar.advance(task)
        console.print(table)
        if reasons:
            console.print(f"{len(reasons)} classes skipped for want of images that show at least 32x32 px of them:")
            for where, reason in reasons.items():
                console.print(f"  {where}: {reason}", highlight=False)


@app.command()
def train(
    fold: FoldOption = 0,
    workers: Annotated[int, typer.Option(min=0, help="Ray Train workers; 0 trains in this process.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimisation steps.")] = 2000,
    epochs: Annotated[
        float | None, typer.Option(help="Instead of --steps; one epoch is as many episodes as training photos.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop at the first checkpoint after this long.")] = None,
    recipe: RecipeOption = None,
    lr: LrOption = None,
    batch_scale: BatchScaleOption = 1.0,
    val_every: Annotated[int, typer.Option(min=1, help="Steps between validations on seen classes.")] = 250,
    preset: Annotated[
        str, typer.Option(help="paper (1.4 M parameters), official (10.1 M), hybrid (matching maps) or debug (tiny).")
    ] = "paper",
    dim: Annotated[int | None, typer.Option(help="D, channels after the neck; default the preset's.")] = None,
    token_pool: Annotated[bool, typer.Option(help="The token pool (paper, official).")] = True,
    mixer: Annotated[bool, typer.Option(help="The class-example mixer (paper, official).")] = True,
    spatial_convs: Annotated[bool, typer.Option(help="The decoder's spatial convolutions.")] = True,
    match_prototypes: Annotated[bool, typer.Option(help="Cosines to prototypes (hybrid).")] = True,
    match_affinity: Annotated[bool, typer.Option(help="Affinity to all support tokens (hybrid).")] = True,
    object_metric: Annotated[bool, typer.Option(help="Matching in a metric fitted to objects (hybrid).")] = True,
    objectness: Annotated[
        int | None, typer.Option(min=0, help="Channels of the query that all classes share (hybrid).")
    ] = None,
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
    """Train LA on the 60 seen classes of a fold. Killed and started again, it goes on from the last checkpoint."""
    with mistakes():
        from pipelines.config import TrainConfig, default_recipe
        from pipelines.tracking import log_training
        from pipelines.training import steps_of_epochs
        from pipelines.training import train as run

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
                class_weights=class_weights,
                warmup_steps=warmup_steps,
            ),
            val_every=val_every,
            preset=preset,
            dim=dim,
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
        Path | None, typer.Option(help="A run's folder or checkpoint; default: the fold's last finished training.")
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
    background: Annotated[
        Literal["learned", "supports"], typer.Option(help="supports: what no prompt covers prompts the background.")
    ] = "learned",
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
        from pipelines.evaluate import evaluate as run
        from pipelines.tracking import log_evaluation

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
            background=background,
            flips=flips,
            gallery=gallery,
            device=device,
            threads=threads,
        )
        with progress_bar() as bar:
            task = bar.add_task(f"fold {fold} {method}", total=None)
            result = run(config, lambda done, total: bar.update(task, completed=done, total=total))
        log_evaluation(config, result)
        table = Table("class", "IoU", "episodes", title=f"{result.method}, fold {fold}, {classes} classes of {split}")
        for name, iou in sorted(result.per_class.items(), key=lambda item: -item[1]):
            table.add_row(name, f"{iou:.1f}", str(result.episodes_per_class[name]))
        console.print(table)
        for name, reason in result.classes_skipped.items():
            console.print(f"  not drawn: {name} ({reason})", highlight=False)
        console.print(
            f"{ways}-way {shots}-shot, {prompt} prompts: mIoU {result.miou:.2f} +- {result.std:.2f} over "
            f"{config.seeds} seeds x {config.episodes} episodes, {result.classes_drawn} classes; "
            f"95 % of resampled episodes {result.interval[0]:.2f} to {result.interval[1]:.2f}, "
            f"FB-IoU {result.fb_iou:.2f}; protocol {protocol}, episodes {result.episodes_digest}",
            highlight=False,
        )
        if picture:
            from pipelines.figures import draw_first_episodes

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
        from pipelines.profile import run_profile

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
def ui(
    port: Annotated[int, typer.Option(help="Port on localhost.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen at; only this machine by default.")] = "127.0.0.1",
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """Open the MLflow UI on this workspace."""
    with mistakes():
        from pipelines.tracking import serve_ui
        from pipelines.workspace import Workspace

        serve_ui(Workspace(workspace), host, port)


@app.command()
def model(
    preset: Annotated[str, typer.Option(help="paper, official, hybrid or debug.")] = "paper",
    channels: Annotated[int, typer.Option(help="Channels of the backbone; 768 for ViT-B.")] = 768,
) -> None:
    """Print the learnable parameters of a preset, part by part."""
    with mistakes():
        from la.model import build
        from la.model import preset as config_of

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
        from la.folds import FOLDS
        from pipelines.official import import_official as run
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
        from pipelines.official import export_official as run

        run(checkpoint, out)
        console.print(f"weights: {out}", highlight=False, soft_wrap=True)


def commas(values) -> str:
    """(1, 2) as "1,2"."""
    return ",".join(map(str, values))


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
        concurrent: Annotated[
            int | None, typer.Option(min=1, help="Trials at once; default: as many as CPUs and GPUs take.")
        ] = None,
        gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of each trial; a fraction shares one.")] = None,
        workspace: WorkspaceOption = WORKSPACE,
        store: StoreOption = None,
        device: DeviceOption = "auto",
        threads: Annotated[int, typer.Option(min=1, help="CPU threads of each trial.")] = 1,
        tracking_uri: Annotated[str | None, typer.Option(help="An MLflow server; default: the workspace's.")] = None,
    ) -> None:
        with mistakes():
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
                | ({"also": [str(path.absolute()) for path in also]} if also else {}),
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
            finish_sweep(run_sweep(config, console, command=shlex.join(["python", *sys.argv])))

    told = (
        "Each variant is trained on each fold and evaluated on unseen classes. Killed and started again, the sweep "
        "goes on where it was; a variant that fails does not lose the others."
    )
    sweep_app.command(study.name, help=f"{study.about}\n\n{told}")(command)


for each in STUDIES.values():
    add_study(each)


def finish_sweep(result) -> None:
    """Print a sweep's tables and where they lie; exit code 1 where a trial failed."""
    for table in result.tables:
        console.print(table.rich())
    for trial, reason in result.failed.items():
        console.print(f"failed: {trial}: {reason.strip().splitlines()[-1]}", style="red", markup=False)
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
        from sweeps.report import write_report

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
) -> None:
    """The whole line on scenes drawn on the spot, without a download: about three minutes on two cores."""
    with mistakes():
        from sweeps.demo import SMALLEST, run_demo

        result, pictures = run_demo(workspace.absolute(), console, SMALLEST if smallest else None)
        console.rule("done")
        for picture in pictures:
            console.print(f"picture: {picture}", highlight=False, soft_wrap=True)
        finish_sweep(result)


@bench_app.command("featurize")
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


@bench_app.command("store")
def bench_store(
    images: Annotated[int, typer.Option(min=8, help="Photos of each pass.")] = 300,
    repeats: RepeatsOption = 5,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Reading a photo's features at random against copying them from a raw memory map."""
    with mistakes():
        from pipelines.bench import bench_store as run
        from pipelines.workspace import Workspace

        show_bench(run(Workspace(workspace).find_store(store), images=images, repeats=repeats))


@bench_app.command("episodes")
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


@bench_app.command("model")
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


@bench_app.command("evaluate")
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


def show_bench(result) -> None:
    """Print a measurement; exit code 1 where it misses its bar."""
    console.print(str(result), highlight=False, markup=False)
    if not result.passed:
        raise typer.Exit(1)


def of_recipe(recipe: str, scale: float, **given) -> dict:
    """Fields of TrainConfig: the recipe, its batches times `scale`, and what is given in its place."""
    from pipelines.config import PAPER_BATCHES, RECIPES

    batches = RECIPES[recipe].get("batches", PAPER_BATCHES)
    scaled = tuple((max(1, round(scale * b)), n, k) for b, n, k in batches)
    return {"recipe": recipe, "batches": scaled} | {name: value for name, value in given.items() if value is not None}


def numbers(text: str, flag: str) -> list[int]:
    """ "0,1,3" as integers; raises InputError naming the flag."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} is {text!r}; expected whole numbers such as 0,1,2.") from error


if __name__ == "__main__":
    app(prog_name=Path(sys.argv[0]).name)
