"""Feature stores of made-up numbers in the shapes of real ones, for measurements that no photo changes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

from la.data.coco import Annotation, Dataset, Image
from pipelines.store.feature_shards import ShardNote, StoreSettings, shard_file, write_shard
from pipelines.store.featurize import plan_shards
from pipelines.store.reader import SplitInfo, StoreInfo, finish_store

MADE_UP = "made up"
HEIGHT, WIDTH = 480, 640  # pixels of a common COCO photo
CLASSES = 80
MASKS, CORNERS, RADII = 500, 24, (25, 110)  # of the outlines that objects take; radii in pixels


def made_up_dataset(split: str, first: int, classes: np.ndarray) -> Dataset:
    """Photos with ids from `first` on; `classes` (photos, objects) has the category of each object, 1 to CLASSES.

    Objects are ellipses, about as large as COCO's objects that are drawn for episodes.
    """
    generator = np.random.default_rng(first)
    masks = [_mask(generator) for _ in range(MASKS)]
    chosen = generator.integers(0, MASKS, classes.shape).tolist()
    images = {i: Image(i, f"{i:012d}.jpg", HEIGHT, WIDTH) for i in range(first, first + len(classes))}
    annotations = {
        i: tuple(
            Annotation(len(cs) * i + n, i, c, False, *masks[m]) for n, (c, m) in enumerate(zip(cs, ms, strict=True))
        )
        for i, cs, ms in zip(images, classes.tolist(), chosen, strict=True)
    }
    return Dataset(split, images, {c: f"class {c}" for c in range(1, CLASSES + 1)}, annotations)


def _mask(generator: np.random.Generator) -> tuple[int, tuple[float, float, float, float], bytes]:
    """(area, box, run lengths) of an ellipse somewhere on a photo."""
    radius = generator.uniform(*RADII, 2)
    centre = generator.uniform(radius, np.array([WIDTH, HEIGHT]) - radius)
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    outline = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    (rle,) = rle_tools.frPyObjects([outline.ravel().tolist()], HEIGHT, WIDTH)
    x, y, w, h = (float(v) for v in rle_tools.toBbox(rle))
    return int(rle_tools.area(rle)), (x, y, x + w, y + h), rle["counts"]


def made_up_features(
    workspace: Path,
    datasets: dict[str, Dataset],
    features: Callable[[Image], np.ndarray],
    patch_size: int,
    shard_size: int | None = None,
) -> Path:
    """Write a finished store of these splits; `features` gives the (h, w, C) float16 of a photo. Returns its folder."""
    h, w, channels = features(next(image for d in datasets.values() for image in d.images.values())).shape
    settings = StoreSettings(
        annotations=dict.fromkeys(datasets, MADE_UP),
        backbone=MADE_UP,
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
        checksums[shard_file(shard.split, shard.number)] = write_shard(shard.file, settings, note, rows).features_sha256
    splits = {
        split: SplitInfo(
            name=split, images=len(d.images), annotations=sum(map(len, d.annotations.values())), skipped={}
        )
        for split, d in datasets.items()
    }
    info = StoreInfo(
        key=settings.key, settings=settings, splits=splits, shards=checksums, coco_dir=MADE_UP, software={}, **shape
    )
    finish_store(path, info, datasets)
    return path
