"""Photos to features, features to episodes."""

from typing import Annotated, Literal

import typer
from rich.table import Table

from commands.options import (
    WORKSPACE,
    AddressOption,
    BackboneOption,
    CocoOption,
    DeviceOption,
    EpisodesOption,
    FoldsOption,
    PhotosOption,
    PromptOption,
    SeedsOption,
    SizeOption,
    StoreOption,
    SupportsOption,
    ThreadsOption,
    WeightsOption,
    WorkspaceOption,
    console,
    mistakes,
    numbers,
    progress_bar,
)

app = typer.Typer()
DtypeOption = Annotated[
    Literal["float16", "int8"],
    typer.Option("--dtype", help="Of the stored features; int8, with a scale per token, takes half the bytes."),
]


FeaturesOption = Annotated[
    str | None,
    typer.Option(
        "--features", help="Copy every shard to this folder too, s3://bucket/folder for example, and go on from there."
    ),
]
UriArgument = Annotated[str, typer.Argument(help="Folder of stores: s3://bucket/folder, gs://..., file:///...")]


@app.command()
def featurize(
    coco_dir: CocoOption,
    backbone: BackboneOption = "vit_base_patch16_224.mae",
    weights: WeightsOption = None,
    image_size: SizeOption = 480,
    workers: Annotated[int, typer.Option(min=0, help="Ray Data workers; 0 works in this process.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos at once through the ViT.")] = 8,
    dtype: DtypeOption = "float16",
    features: FeaturesOption = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out photos that cannot be read.")] = False,
    address: AddressOption = None,
    train_split: Annotated[str | None, typer.Option(help="Such as train2014; default: the newest there.")] = None,
    val_split: Annotated[str | None, typer.Option(help="Such as val2014; default: the newest there.")] = None,
    workspace: WorkspaceOption = WORKSPACE,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Turn every photo into features once, with a frozen ViT. Done twice, there is nothing to do."""
    with mistakes(goes_on=True):
        from pipelines.config import FeaturizeConfig
        from pipelines.store.featurize import featurize as run

        report = run(
            FeaturizeConfig(
                workspace=workspace,
                coco_dir=coco_dir,
                backbone=backbone,
                weights=weights,
                image_size=image_size,
                workers=workers,
                batch_size=batch_size,
                dtype=dtype,
                features=features,
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
def convert(
    dtype: DtypeOption = "int8",
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
) -> None:
    """Make a second feature store from a finished one, its features in fewer bytes; needs no photos."""
    with mistakes(goes_on=True):
        from pipelines.store.convert import convert as run

        with progress_bar() as bar:
            task = bar.add_task("shards", total=None)
            report = run(workspace, store, dtype, lambda done, total: bar.update(task, completed=done, total=total))
        console.print(
            f"{report.made} shards made, {report.already} there already: {100 * report.share:.1f} % of the bytes; "
            f"use it with --store {report.store.name}"
        )
        console.print(f"store: {report.store}", highlight=False, soft_wrap=True)


@app.command()
def push(uri: UriArgument, workspace: WorkspaceOption = WORKSPACE, store: StoreOption = None) -> None:
    """Copy a finished feature store to object storage; files that are there already, and the same, stay."""
    with mistakes(goes_on=True):
        from pipelines.store.remote_store import RemoteStores
        from pipelines.workspace import Workspace

        path = Workspace(workspace).find_store(store)
        with progress_bar() as bar:
            task = bar.add_task("files", total=None)
            copied = RemoteStores(uri).push(path, lambda done, total: bar.update(task, completed=done, total=total))
        console.print(f"{copied} files copied; store {path.name} is at {uri}", highlight=False, soft_wrap=True)


@app.command()
def pull(uri: UriArgument, workspace: WorkspaceOption = WORKSPACE, store: StoreOption = None) -> None:
    """Copy a finished feature store from object storage into the workspace, every shard checked."""
    with mistakes(goes_on=True):
        from pipelines.store.remote_store import RemoteStores
        from pipelines.workspace import Workspace, locked

        features, remote = Workspace(workspace).features, RemoteStores(uri)
        key = store or remote.only_key()
        with locked(features / key, wait=False), progress_bar() as bar:
            task = bar.add_task("files", total=None)
            path = remote.pull(features, key, lambda done, total: bar.update(task, completed=done, total=total))
        console.print(f"store: {path}", highlight=False, soft_wrap=True)


@app.command()
def verify(
    sample: Annotated[int, typer.Option(min=0, help="Photos featurized again and compared.")] = 8,
    repair: Annotated[bool, typer.Option("--repair", help="Make the bad files again, and only these.")] = False,
    coco_dir: PhotosOption = None,
    weights: WeightsOption = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray Data workers of a repair; 0 works in this process.")] = 0,
    workspace: WorkspaceOption = WORKSPACE,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Check a feature store: schema, counts, index, checksums, and some photos anew. Exit code 1 for what stays bad."""
    with mistakes():
        from pipelines.config import VerifyConfig
        from pipelines.store.verify import verify as run

        config = VerifyConfig(
            workspace=workspace,
            store=store,
            sample=sample,
            repair=repair,
            coco_dir=coco_dir,
            weights=weights,
            workers=workers,
            device=device,
            threads=threads,
        )
        with progress_bar() as bar:
            task = bar.add_task("shards", total=None)
            report = run(
                config, lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
            )
        for file, how in report.repaired.items():
            console.print(f"  {file}: {how}", highlight=False, markup=False)
        for file, why in report.bad.items():
            console.print(f"  bad {file}: {why}", style="red", highlight=False, markup=False)
        if report.not_sampled:
            console.print(
                f"not all photos asked for were recomputed: {report.not_sampled}", highlight=False, markup=False
            )
        console.print(
            f"{report.store.name}: {report.shards} shards, {report.images} images, {len(report.bad)} bad files, "
            f"{len(report.repaired)} made again; {report.sampled} photos recomputed, "
            f"largest difference {100 * report.difference:.3f} %",
            highlight=False,
        )
        if report.bad:
            if not repair:
                console.print("--repair makes the bad files again, and only these", highlight=False)
            raise typer.Exit(1)


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
    with mistakes(goes_on=True):
        from pipelines.config import EvaluateConfig, TrainConfig
        from pipelines.episodes.episode_shards import ensure_episodes, evaluation_plan, training_plan
        from pipelines.store.reader import FeatureStore
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
