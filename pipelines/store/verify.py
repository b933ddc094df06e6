"""Whether a feature store is what it says of itself, and making anew what is not."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from la.backbone.quantised import Quantised, quantise
from la.backbone.vit import Backbone, identify_weights, load_backbone
from la.data.coco import Dataset, Image, find_splits, load_coco
from la.data.photos import read_photo
from la.device import pick_device
from la.errors import InputError
from pipelines.config import FeaturizeConfig, VerifyConfig
from pipelines.remote_path import path_or_uri
from pipelines.store.feature_shards import FEATURES, MappedShard, ShardNote, open_shard, shard_file
from pipelines.store.featurize import make_shards, plan_shards, store_settings, without
from pipelines.store.reader import FeatureStore, finish_store, read_index
from pipelines.store.shard_maker import Shard
from pipelines.workspace import Workspace, locked

# Share of a photo's features (as norms) that they may be off: other batches, threads and devices round otherwise, by
# up to a percent in bfloat16; those of another photo are off by about as much as they are large.
TOLERANCE = 0.05

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]  # (what is done, how many, of how many)


@dataclass
class VerifyReport:
    """What was looked at, what is bad of it (file -> why), and what was repaired."""

    store: Path
    shards: int
    images: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    sampled: int = 0  # photos recomputed
    difference: float = 0.0  # the largest of them from what is stored: norm of the difference over norm of the features
    not_sampled: str = ""  # why photos were not recomputed
    repaired: dict[str, str] = field(default_factory=dict)  # file -> how it compares with what was there


def verify(config: VerifyConfig, on_progress: OnProgress = lambda *_: None) -> VerifyReport:
    """Check every file of a store and recompute a sample; with `repair`, make the bad files again and check anew.

    Raises InputError for a store without a usable store.json, and where a repair lacks photos, weights or the settings
    that the store was made with, or another process writes the store.
    """
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    with locked(store.path, wait=False) if config.repair else nullcontext():
        report = _check(store, config, on_progress)
        if config.repair and report.bad:
            repaired = _repair(store, report.bad, config, on_progress)
            report = _check(FeatureStore(store.path), config, on_progress)
            report.repaired = repaired
        return report


def _check(store: FeatureStore, config: VerifyConfig, on_progress: OnProgress) -> VerifyReport:
    files = sorted(store.info.shards)
    report = VerifyReport(store.path, len(files))

    def attempt(file: str, check: Callable[..., T], *args: object) -> T | None:
        try:
            return check(store, *args)
        except InputError as error:
            report.bad[file] = str(error)
        except ValueError as error:
            report.bad[file] = f"{store.path / file}: {error}"

    placed = attempt("index.parquet", _placed) or {}
    report.images = sum(map(len, placed.values()))
    for split in store.info.splits:
        attempt(f"annotations-{split}.parquet", _check_annotations, split, placed)
    if report.bad:
        report.not_sampled = "index or annotations are damaged"
    for done, file in enumerate(files, start=1):
        attempt(file, _check_shard, file, placed.get(file))
        on_progress("shards", done, len(files))
    if config.sample and not report.not_sampled:
        try:
            _sample(store, report, config, on_progress)
        except InputError as error:
            report.not_sampled = str(error)
    return report


def _placed(store: FeatureStore) -> dict[str, list[int]]:
    table = read_index(store.path)
    rows = sorted(zip(*(table[c].to_pylist() for c in ("split", "shard", "row_group", "image_id")), strict=True))
    placed: dict[str, list[int]] = {file: [] for file in store.info.shards}
    for split, shard, group, image_id in rows:
        file = shard_file(split, shard)
        if file not in placed or group != len(placed[file]):
            raise ValueError(f"image {image_id} is said to be row group {group} of {file}, which is not so")
        placed[file].append(image_id)
    for split, about in store.info.splits.items():
        found = sum(len(ids) for file, ids in placed.items() if file.startswith(f"{split}/"))
        if found != about.images:
            raise ValueError(f"it lists {found} images of {split}, but store.json counts {about.images}")
    return placed


def _check_annotations(store: FeatureStore, split: str, where: dict[str, list[int]]) -> None:
    dataset, about = store.dataset(split), store.info.splits[split]
    annotations = sum(map(len, dataset.annotations.values()))
    if (len(dataset.images), annotations) != (about.images, about.annotations):
        raise ValueError(
            f"{len(dataset.images)} images and {annotations} annotations, but store.json counts {about.images} and "
            f"{about.annotations}"
        )
    placed = {image_id for file, ids in where.items() if file.startswith(f"{split}/") for image_id in ids}
    if where and placed != set(dataset.images):
        raise ValueError(f"its images are not those that index.parquet lists of {split}")


def _check_shard(store: FeatureStore, file: str, placed: list[int] | None) -> None:
    """Raises InputError or ValueError. `placed`: the ids that the index says are there; None: it says nothing."""
    info, path = store.info, store.path / file
    note = store.check_shard(file)
    opened = open_shard(path, info.key)[0]
    if not opened.schema_arrow.remove_metadata().equals(FEATURES):
        raise ValueError(f"its columns are {opened.schema_arrow.names}, expected {FEATURES.names}")
    said = (shard_file(note.split, note.number), note.weights_digest, note.channels, note.grid)
    if said != (file, info.weights_digest, info.channels, info.grid):
        raise ValueError("it says that it is another shard, of other weights or another shape than store.json says")
    ids = opened.read(columns=["image_id"])["image_id"].to_pylist()
    if len(ids) != note.rows or ids != (ids if placed is None else placed):
        raise ValueError(f"its {len(ids)} images are not the {note.rows if placed is None else len(placed)} expected")
    MappedShard(path, info.key, (*info.grid, info.channels), info.dtype)


def _photos(store: FeatureStore, config: VerifyConfig) -> dict[str, Path]:
    """split -> folder of its photos. Raises InputError where one is not there."""
    root = path_or_uri(config.coco_dir or store.info.coco_dir)
    folders = {split: root / about.name for split, about in store.info.splits.items()}
    for folder in folders.values():
        if not folder.is_dir():
            raise InputError(f"there are no photos at {folder}: pass --coco-dir")
    return folders


def _backbone(store: FeatureStore, config: VerifyConfig) -> Backbone:
    info = store.info
    if config.threads:
        torch.set_num_threads(config.threads)
    found = identify_weights(info.backbone, config.weights)
    if found != info.weights:
        raise InputError(f"--weights are {found}, but the features were made with {info.weights}: pass these")
    return load_backbone(info.backbone, info.image_size, config.weights, pick_device(config.device))


def _sample(store: FeatureStore, report: VerifyReport, config: VerifyConfig, on_progress: OnProgress) -> None:
    """Raises InputError where photos or weights are not there or are others."""
    photos, backbone = _photos(store, config), _backbone(store, config)
    images = []
    for file in sorted(store.info.shards.keys() - report.bad.keys()):
        note = open_shard(store.path / file, store.key)[1]
        known = store.dataset(note.split).images
        images += [(file, known[i]) for i in note.image_ids if i in known]
    chosen = np.random.default_rng(len(images)).permutation(len(images))[: config.sample]
    for file, image in (images[k] for k in sorted(chosen)):
        off = _difference(store, backbone, photos[file.split("/")[0]], image)
        report.sampled += 1
        report.difference = max(report.difference, off)
        if not off <= TOLERANCE:
            report.bad[file] = (
                f"{store.path / file}: the features of {image.file_name} are off by {100 * off:.1f} % from what the "
                "backbone makes of the photo now; the photo or the features were changed"
            )
        on_progress("photos recomputed", report.sampled, len(chosen))


def _difference(store: FeatureStore, backbone: Backbone, folder: Path, image: Image) -> float:
    photo = read_photo(folder / image.file_name, store.info.image_size, (image.height, image.width))
    features = backbone.encode(photo[None]).cpu()
    if store.info.dtype == "int8":
        features = Quantised(*map(torch.from_numpy, quantise(features.numpy()))).to("cpu")
    stored, made = store.read_batch([image.id]).float(), features.float()
    return float((stored - made).norm() / made.norm().clamp(min=1e-6))


def _repair(store: FeatureStore, bad: dict[str, str], config: VerifyConfig, on_progress: OnProgress) -> dict[str, str]:
    """Make the bad files again. Returns how each compares with what store.json said was there."""
    info = store.info
    featurizing = FeaturizeConfig(
        **config.model_dump(include={"workspace", "weights", "workers", "device", "threads"}),
        coco_dir=path_or_uri(config.coco_dir or info.coco_dir).absolute(),
        train_split=info.splits["train"].name,
        val_split=info.splits["val"].name,
        backbone=info.backbone,
        image_size=info.image_size,
        dtype=info.dtype,
        batch_size=info.batch_size,
        skip_bad=bool(info.skipped),
    )
    splits = find_splits(featurizing.coco_dir, {split: about.name for split, about in info.splits.items()})
    settings = store_settings(featurizing, splits)
    for name, ours in settings:
        if ours != (theirs := getattr(info.settings, name)):
            raise InputError(
                f"--repair would make the features with {name} {ours}, but the store was made with {theirs}. "
                "Pass the --coco-dir and --weights that it was made with, or run `featurize` for a new store."
            )
    datasets = {split: load_coco(*splits[split], split) for split in info.splits}
    shards = _planned(store, datasets, {split: photos for split, (_, photos) in splits.items()}, bad)
    wanted = [shard for shard in shards if shard.file.relative_to(store.path).as_posix() in bad]
    made: dict[str, ShardNote] = {}
    done, total = 0, sum(len(shard.images) for shard in wanted)

    def advance(images: int, _: float) -> None:
        nonlocal done
        done += images
        on_progress("photos featurized again", done, total)

    for shard, note in make_shards(featurizing, settings, wanted, advance) if wanted else ():
        if note.weights_digest != info.weights_digest:
            raise InputError(
                f"{info.backbone} has other weights now ({note.weights_digest[:12]}) than when the store was made "
                f"({info.weights_digest[:12]}). Restore them, or remove {store.path} and run `featurize` again."
            )
        made[shard.file.relative_to(store.path).as_posix()] = note
    checksums = info.shards | {file: note.features_sha256 for file, note in made.items()}
    kept = {split: without(datasets[split], info.splits[split].skipped) for split in info.splits}
    finish_store(store.path, info.model_copy(update={"shards": checksums}), kept)
    return {
        file: "made again" if file not in made else
        "made again, bit for bit" if info.shards[file] == checksums[file] else
        "made again; its rounding differs from what was there: another machine or number of threads"
        for file in bad
    }  # fmt: skip


def _planned(
    store: FeatureStore, datasets: dict[str, Dataset], photos: dict[str, Path], bad: dict[str, str]
) -> list[Shard]:
    """The shards as `featurize` planned them, told by those that are whole. Raises InputError where none fits."""
    files = set(store.info.shards)
    notes = {file: open_shard(store.path / file, store.key)[1].image_ids for file in files - bad.keys()}
    sizes = [None, max(map(len, notes.values()), default=None)]
    for size in sizes:
        shards = plan_shards(store.path, datasets, photos, size)
        planned = {s.file.relative_to(store.path).as_posix(): [image.id for image in s.images] for s in shards}
        if planned.keys() == files and all(planned[file] == ids for file, ids in notes.items()):
            return shards
    raise InputError(
        f"{store.path} is too damaged to tell which photos its shards held. Remove it and run `featurize` again."
    )
