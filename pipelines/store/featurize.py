"""Photos to features: the frozen ViT goes over every photo once, and the result becomes a feature store.

The unit of work is a shard of the store: made under a temporary name and renamed, so a run that was stopped goes on
where it was, and a finished one has nothing to do.
"""

import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from la.backbone.vit import LAYER, identify_weights, preprocessing
from la.data.coco import Dataset, find_splits, load_coco
from la.errors import InputError
from pipelines.config import FeaturizeConfig
from pipelines.store.feature_shards import ShardNote, StoreSettings, open_shard, shard_file
from pipelines.store.featurize_on_ray import make_with_ray
from pipelines.store.reader import SplitInfo, StoreInfo, finish_store, read_info
from pipelines.store.remote_store import RemoteStores
from pipelines.store.shard_maker import Shard, ShardMaker, described
from pipelines.workspace import Workspace, locked


@dataclass(frozen=True)
class FeaturizeReport:
    """What a run did: the store's folder, photos by what became of them, and photos per second while working."""

    store: Path
    made: int
    already: int
    skipped: dict[str, str]  # file name -> reason, of the whole store
    images_per_second: float


def store_settings(config: FeaturizeConfig, splits: dict[str, tuple[Path, Path]]) -> StoreSettings:
    """All that decides the features, without loading annotations or the model. Raises InputError as its parts do."""
    digests = {}
    for split, (file, _) in splits.items():
        with file.open("rb") as content:
            digests[split] = hashlib.file_digest(content, "sha256").hexdigest()
    return StoreSettings(
        annotations=digests,
        backbone=config.backbone,
        weights=identify_weights(config.backbone, config.weights),
        image_size=config.image_size,
        preprocessing=preprocessing(config.backbone),
        layer=LAYER,
        dtype=config.dtype,
    )


def featurize(config: FeaturizeConfig, console: Console | None = None) -> FeaturizeReport:
    """Make the feature store of a COCO folder, or what is missing of it.

    Raises InputError for a folder, split, photo, backbone, image size or weights that cannot be used, for shards in the
    way that were made with other settings, and where another process writes the store.
    """
    config = config.model_copy(
        update={
            "coco_dir": config.coco_dir.absolute(),
            "weights": config.weights and config.weights.absolute(),
            "threads": config.threads or max(1, (os.cpu_count() or 1) // max(1, config.workers)),
        }
    )
    splits = find_splits(config.coco_dir, {"train": config.train_split, "val": config.val_split})
    settings = store_settings(config, splits)
    store = Workspace(config.workspace).features / settings.key
    if not config.features and (store / "store.json").exists():
        return _finished(store)  # only read, whoever holds it
    with locked(store, wait=False):
        remote = RemoteStores(config.features) if config.features else None
        if remote:
            remote.pull_unfinished(store)
        if (store / "store.json").exists():
            report = _finished(store)
        else:
            report = _make_store(store, config, settings, splits, remote, console or Console(stderr=True))
        if remote:
            remote.push(store)
        return report


def _finished(store: Path) -> FeaturizeReport:
    info = read_info(store)
    return FeaturizeReport(store, 0, sum(split.images for split in info.splits.values()), info.skipped, 0.0)


def _make_store(
    store: Path,
    config: FeaturizeConfig,
    settings: StoreSettings,
    splits: dict[str, tuple[Path, Path]],
    remote: RemoteStores | None,
    console: Console,
) -> FeaturizeReport:
    """Make what is missing of `store`, which this process holds."""
    datasets = {split: load_coco(file, photos, split) for split, (file, photos) in splits.items()}
    shared = datasets["train"].images.keys() & datasets["val"].images.keys()
    if shared:
        raise InputError(
            f"{splits['train'][0]} and {splits['val'][0]} share {len(shared)} image ids, e.g. {min(shared)}; expected "
            "ids of their own, by which everything later tells photos apart. Renumber one of them."
        )
    folders = {split: photos for split, (_, photos) in splits.items()}
    shards = plan_shards(store, datasets, folders, config.shard_size)
    notes = {shard.file: _existing(shard, settings.key, config.skip_bad) for shard in shards if shard.file.exists()}
    already = sum(note.rows for note in notes.values())
    seconds = _make_missing(config, settings, shards, notes, console, remote)
    about, kept = {}, {}
    for split, (annotations, photos) in splits.items():
        skipped = {f: why for note in notes.values() if note.split == split for f, why in note.skipped.items()}
        kept[split] = without(datasets[split], skipped)
        counts = {"images": len(kept[split].images), "annotations": sum(map(len, kept[split].annotations.values()))}
        about[split] = SplitInfo(name=photos.name, skipped=skipped, **counts)
        if not kept[split].images:
            raise InputError(f"{annotations} leaves no usable photo for {split}; expected at least one.")
    info = StoreInfo(
        key=settings.key,
        settings=settings,
        splits=about,
        shards={file.relative_to(store).as_posix(): note.features_sha256 for file, note in sorted(notes.items())},
        coco_dir=str(config.coco_dir),
        batch_size=config.batch_size,
        software={name: importlib.metadata.version(name) for name in ("torch", "timm", "pyarrow", "pillow")},
        **described(next(iter(notes.values()))),
    )
    finish_store(store, info, kept)
    made = sum(note.rows for note in notes.values()) - already
    return FeaturizeReport(store, made, already, info.skipped, made / seconds if made else 0.0)


def plan_shards(
    store: Path, datasets: dict[str, Dataset], photos: dict[str, Path], shard_size: int | None
) -> list[Shard]:
    """The shards of a store, by image id within each split; `shard_size` None takes 1/64 of a split, 16 to 1,000."""
    shards = []
    for split, dataset in datasets.items():
        images = list(dataset.images.values())
        size = shard_size or min(max(len(images) // 64, 16), 1000)
        for number, start in enumerate(range(0, len(images), size)):
            file = store / shard_file(split, number)
            part = images[start : start + size]
            shards.append(Shard(file=file, split=split, number=number, photos=photos[split].absolute(), images=part))
    return shards


def _existing(shard: Shard, key: str, skip_bad: bool) -> ShardNote:
    note = open_shard(shard.file, key)[1]
    store = shard.file.parent.parent
    if note.image_ids != [image.id for image in shard.images]:
        raise InputError(
            f"{shard.file} holds {len(note.image_ids)} photos that are not the {len(shard.images)} planned: another "
            f"version made it, or Python code with another shard_size. Use that again, or remove {store}."
        )
    if note.skipped and not skip_bad:
        raise InputError(
            f"{shard.file} was made with --skip-bad and leaves out {len(note.skipped)} photos, e.g. "
            f"{next(iter(note.skipped.values()))} Pass --skip-bad again, or fix them and remove {shard.file}."
        )
    return note


def _make_missing(
    config: FeaturizeConfig,
    settings: StoreSettings,
    shards: list[Shard],
    notes: dict[Path, ShardNote],
    console: Console,
    remote: RemoteStores | None,
) -> float:
    """Adds the notes of missing shards to `notes`; returns the seconds this took without loading the model."""
    missing = [shard for shard in shards if shard.file not in notes]
    if not missing:
        return 0.0
    already = sum(len(note.image_ids) for note in notes.values())
    columns = (TextColumn("featurize"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as progress:
        total = sum(len(shard.images) for shard in shards)
        bar = progress.add_task("featurize", total=total, completed=already, rate="loading the model")
        started: float | None = None
        done = 0

        def advance(images: int, seconds: float) -> None:
            nonlocal started, done
            now = time.perf_counter()
            started = now - seconds if started is None else started
            done += images
            progress.update(bar, advance=images, rate=f"{done / (now - started):.1f} images/s")

        for shard, note in make_shards(config, settings, missing, advance):
            file, first = next(iter(notes.items()), (shard.file, note))
            if note.weights_digest != first.weights_digest:
                raise InputError(
                    f"{file} was made with other weights ({first.weights_digest[:12]}) than those loaded now "
                    f"({note.weights_digest[:12]}): they changed since. Remove {file.parent.parent}, or restore them."
                )
            notes[shard.file] = note
            if remote:
                remote.put(shard.file.parents[1], shard_file(shard.split, shard.number))
    return time.perf_counter() - (started or 0.0)


def make_shards(
    config: FeaturizeConfig, settings: StoreSettings, missing: list[Shard], advance: Callable[[int, float], None]
) -> Iterator[tuple[Shard, ShardNote]]:
    """Make shards, here or by `config.workers`; yields each as it is done. `advance` gets photos and their seconds."""
    if config.workers:
        yield from make_with_ray(config, settings, missing, advance)
    else:
        maker = ShardMaker(config, settings)
        for shard in missing:
            yield shard, maker.make(shard, advance)


def without(dataset: Dataset, skipped: dict[str, str]) -> Dataset:
    """The dataset less the photos of these file names."""
    images = {i: image for i, image in dataset.images.items() if image.file_name not in skipped}
    return Dataset(dataset.split, images, dataset.categories, {i: dataset.annotations[i] for i in images})
