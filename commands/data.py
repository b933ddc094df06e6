"""Photos to features, features to episodes."""

from typing import Annotated

import typer
from rich.table import Table

from commands.options import AddressOption, console, progress_bar, say, verb
from pipelines.config import EpisodesConfig, FeaturizeConfig, StoredDtype, StoreSettings, VerifyConfig

app = typer.Typer()
SHOWN = 12  # classes that were skipped
UriArgument = Annotated[str, typer.Argument(help="Folder of stores: s3://bucket/folder, gs://..., file:///...")]


@verb(app, FeaturizeConfig, goes_on=True)
def featurize(config: FeaturizeConfig, address: AddressOption = None) -> None:
    """Turn every photo into features once, with a frozen ViT. Done twice, there is nothing to do."""
    from pipelines.store.featurize import featurize as run

    report = run(config, console)
    rate = f" at {report.images_per_second:.2f} images/s" if report.made else ""
    say(
        f"{report.made} photos featurized{rate}, {report.already} there already, {len(report.skipped)} skipped",
        *(f"  skipped {name}: {reason}" for name, reason in report.skipped.items()),
        f"store: {report.store}",
    )


@verb(app, StoreSettings, goes_on=True)
def convert(
    config: StoreSettings,
    dtype: Annotated[StoredDtype, typer.Option(help="Of the new store; int8 takes half the bytes.")] = "int8",
) -> None:
    """Make a second feature store from a finished one, its features in fewer bytes; needs no photos."""
    from pipelines.store.convert import convert as run

    with progress_bar() as bar:
        task = bar.add_task("shards", total=None)
        step = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        report = run(config.workspace, config.store, dtype, step)
    say(
        f"{report.made} shards made, {report.already} there already: {100 * report.share:.1f} % of the bytes; "
        f"use it with --store {report.store.name}",
        f"store: {report.store}",
    )


@verb(app, StoreSettings, goes_on=True)
def push(config: StoreSettings, uri: UriArgument) -> None:
    """Copy a finished feature store to object storage; files that are there already, and the same, stay."""
    from pipelines.store.remote_store import RemoteStores
    from pipelines.workspace import Workspace

    path = Workspace(config.workspace).find_store(config.store)
    with progress_bar() as bar:
        task = bar.add_task("files", total=None)
        copied = RemoteStores(uri).push(path, lambda done, total: bar.update(task, completed=done, total=total))
    say(f"{copied} files copied; store {path.name} is at {uri}")


@verb(app, StoreSettings, goes_on=True)
def pull(config: StoreSettings, uri: UriArgument) -> None:
    """Copy a finished feature store from object storage into the workspace, every shard checked."""
    from pipelines.store.remote_store import RemoteStores
    from pipelines.workspace import Workspace, locked

    features, remote = Workspace(config.workspace).features, RemoteStores(uri)
    key = config.store or remote.only_key()
    with locked(features / key, wait=False), progress_bar() as bar:
        task = bar.add_task("files", total=None)
        path = remote.pull(features, key, lambda done, total: bar.update(task, completed=done, total=total))
    say(f"store: {path}")


@verb(app, VerifyConfig)
def verify(config: VerifyConfig) -> None:
    """Check a feature store: schema, counts, index, checksums, and some photos anew. Exit code 1 for what stays bad."""
    from pipelines.store.verify import verify as run

    with progress_bar() as bar:
        task = bar.add_task("shards", total=None)
        report = run(config, lambda what, done, all_: bar.update(task, description=what, completed=done, total=all_))
    say(*(f"  {file}: {how}" for file, how in report.repaired.items()))
    for file, why in report.bad.items():
        console.print(f"  bad {file}: {why}", style="red", highlight=False, markup=False)
    if report.not_sampled:
        say(f"not all photos asked for were recomputed: {report.not_sampled}")
    say(
        f"{report.store.name}: {report.shards} shards, {report.images} images, {len(report.bad)} bad files, "
        f"{len(report.repaired)} made again; {report.sampled} photos recomputed, "
        f"largest difference {100 * report.difference:.3f} %"
    )
    if report.bad:
        say(*([] if config.repair else ["--repair makes the bad files again, and only these"]))
        raise typer.Exit(1)


@verb(app, EpisodesConfig, goes_on=True)
def episodes(config: EpisodesConfig) -> None:
    """Draw COCO-20i episodes into Parquet shards. Later verbs draw what they miss, so this one is for looking first."""
    from pipelines.episodes.overview import draw_all

    table = Table("fold", "for", "classes", "ways", "shots", "seed", "episodes", "drawn", "skipped", "digest")
    with progress_bar() as bar:
        task = bar.add_task("episode sets", total=None)
        rows, skipped = draw_all(config, lambda done, total: bar.update(task, completed=done, total=total))
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
    if skipped:
        say(f"{len(skipped)} classes skipped for want of images that show at least 32x32 px of them, such as")
        say(*(f"  {where}: {reason}" for where, reason in list(skipped.items())[:SHOWN]))
