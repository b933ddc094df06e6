"""Feature stores of made-up numbers in the shapes of real ones, for measurements that no photo changes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from la.data.coco import Dataset, Image
from pipelines.store.feature_shards import ShardNote, StoreSettings, shard_file, write_shard
from pipelines.store.featurize import plan_shards
from pipelines.store.reader import SplitInfo, StoreInfo, finish_store

MADE_UP = "made up"
CORNERS = 24  # of an outline


def made_up_features(
    workspace: Path,
    datasets: dict[str, Dataset],
    features: Callable[[Image], np.ndarray],
    patch_size: int,
    backbone: str = MADE_UP,
    shard_size: int | None = None,
) -> Path:
    """Write a finished store of these splits; `features` gives the (h, w, C) float16 of a photo. Returns its folder."""
    h, w, channels = features(next(image for d in datasets.values() for image in d.images.values())).shape
    settings = StoreSettings(
        annotations=dict.fromkeys(datasets, MADE_UP),
        backbone=backbone,
        weights=MADE_UP,
        image_size=h * patch_size,
        preprocessing={},
        layer=MADE_UP,
    )
    shape = {"weights_digest": MADE_UP, "patch_size": patch_size, "channels": channels, "grid": (h, w)}
    path = workspace / "features" / settings.key
    checksums = {}
    for shard in plan_shards(path, datasets, dict.fromkeys(datasets, path), shard_size):
        ids = [image.id for image in shard.images]
        note = ShardNote(key=settings.key, split=shard.split, number=shard.number, image_ids=ids, skipped={}, **shape)
        rows = ((image, features(image)) for image in shard.images)
        made = write_shard(shard.file, settings, note, rows)
        checksums[shard_file(shard.split, shard.number)] = made.features_sha256
    info = StoreInfo(
        key=settings.key,
        settings=settings,
        splits={
            split: SplitInfo(
                name=split, images=len(d.images), annotations=sum(map(len, d.annotations.values())), skipped={}
            )
            for split, d in datasets.items()
        },
        shards=checksums,
        coco_dir=MADE_UP,
        software={},
        **shape,
    )
    finish_store(path, info, datasets)
    return path


def ellipse(generator: np.random.Generator, radii: tuple[float, float], width: int, height: int) -> np.ndarray:
    """(CORNERS, 2) x and y of an outline somewhere on a photo, its radii in pixels between these two."""
    radius = generator.uniform(*radii, 2)
    centre = generator.uniform(radius, np.array([width, height]) - radius)
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    return centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
