"""Making the shards of a feature store: decode, featurize, write; here in one process, by Ray in `featurize_on_ray`."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel

from la.backbone.vit import Backbone, load_backbone
from la.data.coco import Image
from la.data.photos import read_photo
from la.device import pick_device
from la.errors import InputError
from pipelines.config import FeaturizeConfig
from pipelines.remote_path import PathOrUri, RemotePath, Unreachable
from pipelines.store.feature_shards import ShardNote, ShardWriter, StoreSettings

READERS = 16  # threads that ask a server for photos: they wait, and need no CPU
DECODERS = 8  # threads, and batches decoded ahead, at most; one core decodes about 70 COCO photos a second


class Shard(BaseModel):
    """One file of the store: its photos, of the folder `photos`. Plain data, as it travels to Ray workers."""

    file: Path
    split: str
    number: int
    photos: PathOrUri
    images: list[Image]

    def batches(self, size: int) -> list[list[Image]]:
        """Photos that pass through the backbone together: the same however many workers there are."""
        return [self.images[start : start + size] for start in range(0, len(self.images), size)]

    def note(self, settings: StoreSettings, skipped: dict[str, str], backbone: dict[str, Any]) -> ShardNote:
        """What the shard says of itself; `backbone` is as of `described`."""
        ids = [image.id for image in self.images]
        own = {"key": settings.key, "split": self.split, "number": self.number, "image_ids": ids, "skipped": skipped}
        return ShardNote(**own, **backbone)


class Decoded(NamedTuple):
    """The usable photos of a batch, (B, 3, S, S) uint8, and file name -> reason of those that are left out."""

    images: list[Image]
    photos: torch.Tensor
    skipped: dict[str, str]


def decode(config: FeaturizeConfig, folder: Path | RemotePath, batch: list[Image]) -> Decoded:
    """Read photos. Raises InputError for one that cannot be used, unless the settings say to skip such."""

    def read(image: Image) -> torch.Tensor | InputError:
        try:
            return read_photo(folder / image.file_name, config.image_size, (image.height, image.width))
        except InputError as error:
            if not config.skip_bad or isinstance(error, Unreachable):
                raise
            return error

    at_once = READERS if isinstance(folder, RemotePath) else 1
    with ThreadPoolExecutor(at_once) as readers:
        found = dict(zip((image.file_name for image in batch), readers.map(read, batch), strict=True))
    images = [image for image in batch if isinstance(found[image.file_name], torch.Tensor)]
    photos = [found[image.file_name] for image in images]
    skipped = {name: str(error) for name, error in found.items() if isinstance(error, InputError)}
    side = config.image_size
    return Decoded(images, torch.stack(photos) if photos else torch.empty(0, 3, side, side, dtype=torch.uint8), skipped)


def load(config: FeaturizeConfig) -> Backbone:
    """The backbone, with the torch threads that the settings give it. Raises InputError as `load_backbone`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return load_backbone(config.backbone, config.image_size, config.weights, pick_device(config.device))


def described(backbone: Backbone | ShardNote) -> dict[str, Any]:
    """What notes and store.json say of a backbone; the same of a note."""
    return {name: getattr(backbone, name) for name in ("weights_digest", "patch_size", "channels", "grid")}


def encode(backbone: Backbone, images: list[Image], photos: torch.Tensor) -> np.ndarray:
    """(B, 3, S, S) uint8 -> (B, h, w, C) float16. Raises InputError for features that float16 cannot hold."""
    if not images:
        return np.empty((0, *backbone.grid, backbone.channels), np.float16)
    features = backbone.encode(photos).cpu().numpy()
    if not np.isfinite(features).all():
        raise InputError(
            f"{backbone.name} gives features that float16 cannot hold for some photo among "
            f"{', '.join(image.file_name for image in images)}. Check --weights."
        )
    return features


class ShardMaker:
    """Makes shards with one backbone, which is loaded when the first shard asks for it."""

    def __init__(self, config: FeaturizeConfig, settings: StoreSettings):
        self.config = config
        self.settings = settings

    @cached_property
    def backbone(self) -> Backbone:
        return load(self.config)

    def make(self, shard: Shard, advance: Callable[[int, float], None] = lambda *_: None) -> ShardNote:
        """Featurize and write one shard; `advance` gets the photos and the seconds of each batch.

        Raises InputError for a photo that cannot be used, unless the settings say to skip such.
        """
        backbone, skipped = self.backbone, {}
        started = time.perf_counter()
        with ShardWriter(shard.file, self.settings) as file:
            for decoded in self._decoded(shard):
                skipped |= decoded.skipped
                features = encode(backbone, decoded.images, decoded.photos)
                for image, row in zip(decoded.images, features, strict=True):
                    file.add(image, row)
                now = time.perf_counter()
                advance(len(decoded.images) + len(decoded.skipped), now - started)
                started = now
            return file.finish(shard.note(self.settings, skipped, described(backbone)))

    def _decoded(self, shard: Shard) -> Iterator[Decoded]:
        """Batch after batch, some of them decoded while the model works."""
        at_once = min(DECODERS, os.cpu_count() or 1)
        batches = iter(shard.batches(self.config.batch_size))
        decoders = ThreadPoolExecutor(at_once)
        start = partial(decoders.submit, decode, self.config, shard.photos)
        try:
            waiting = deque(map(start, islice(batches, at_once + 1)))
            while waiting:
                decoded = waiting.popleft().result()
                waiting.extend(map(start, islice(batches, 1)))
                yield decoded
        finally:
            decoders.shutdown(cancel_futures=True)
