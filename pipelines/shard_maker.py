"""Making the shards of a feature store: decode, featurize, write; in this process or by Ray Data actors."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from la.backbone import Backbone, load_backbone, read_photo
from la.coco import Image
from la.device import pick_device
from la.errors import InputError
from pipelines.cluster import ray_session
from pipelines.config import FeaturizeConfig
from pipelines.shards import ShardNote, StoreSettings, write_shard

AHEAD = 2  # batches decoded while the model works; bounds the memory
DECODERS = 8  # threads at most; one core decodes about 70 COCO photos a second


class Shard(BaseModel):
    """One unit of work: the photos of one file of the store. Plain data, as it travels to Ray workers."""

    file: Path
    split: str
    number: int
    photos: Path  # folder
    images: list[Image]


class ShardMaker:
    """Makes shards with one backbone, which is loaded when the first shard asks for it."""

    def __init__(self, config: FeaturizeConfig, settings: StoreSettings):
        self.config = config
        self.settings = settings

    @cached_property
    def backbone(self) -> Backbone:
        c = self.config
        if c.threads:
            torch.set_num_threads(c.threads)
        return load_backbone(c.backbone, c.image_size, c.weights, pick_device(c.device))

    def make(self, shard: Shard, advance: Callable[[int, float], None] | None = None) -> ShardNote:
        """Featurize and write one shard; `advance` gets the photos and the seconds of each batch.

        Raises InputError for a photo that cannot be used, unless the settings say to skip such.
        """
        backbone = self.backbone
        note = ShardNote(
            key=self.settings.key,
            split=shard.split,
            number=shard.number,
            image_ids=[image.id for image in shard.images],
            skipped={},
            weights_digest=backbone.weights_digest,
            patch_size=backbone.patch_size,
            channels=backbone.channels,
            grid=backbone.grid,
        )
        return write_shard(shard.file, self.settings, note, self._rows(shard, note, advance or (lambda *_: None)))

    def _rows(
        self, shard: Shard, note: ShardNote, advance: Callable[[int, float], None]
    ) -> Iterator[tuple[Image, np.ndarray]]:
        started = time.perf_counter()
        for images, photos in self._decoded(shard):
            good = []
            for image, photo in zip(images, photos, strict=True):
                if isinstance(photo, torch.Tensor):
                    good.append((image, photo))
                elif self.config.skip_bad:
                    note.skipped[image.file_name] = str(photo)
                else:
                    raise photo
            if good:
                features = self.backbone.encode(torch.stack([photo for _, photo in good])).cpu().numpy()
                if not np.isfinite(features).all():
                    raise InputError(
                        f"{self.config.backbone} gives features that float16 cannot hold for some photo among "
                        f"{', '.join(image.file_name for image, _ in good)}. Check --weights."
                    )
                yield from zip((image for image, _ in good), features, strict=True)
            now = time.perf_counter()
            advance(len(images), now - started)
            started = now

    def _decoded(self, shard: Shard) -> Iterator[tuple[list[Image], list[torch.Tensor | InputError]]]:
        def read(image: Image) -> torch.Tensor | InputError:
            try:
                return read_photo(shard.photos / image.file_name, self.config.image_size, (image.height, image.width))
            except InputError as error:
                return error

        size = self.config.batch_size
        batches = [shard.images[i : i + size] for i in range(0, len(shard.images), size)]
        decoders = ThreadPoolExecutor(max_workers=min(DECODERS, os.cpu_count() or 1))
        try:
            waiting = deque([decoders.submit(read, image) for image in batch] for batch in batches[:AHEAD])
            for number, batch in enumerate(batches):
                photos = [future.result() for future in waiting.popleft()]
                if number + AHEAD < len(batches):
                    waiting.append([decoders.submit(read, image) for image in batches[number + AHEAD]])
                yield batch, photos
        finally:
            decoders.shutdown(cancel_futures=True)


class RayShardMaker:
    """A Ray Data actor: one shard in, its note out. The user's mistakes travel as text, to be raised by the driver."""

    def __init__(self, config: str, settings: str):
        self.maker = ShardMaker(
            FeaturizeConfig.model_validate_json(config), StoreSettings.model_validate_json(settings)
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        note, mistake, started = "", "", time.perf_counter()
        try:
            self.maker.backbone  # noqa: B018  loading is no part of the rate
            started = time.perf_counter()
            note = self.maker.make(Shard.model_validate_json(str(batch["shard"][0]))).model_dump_json()
        except InputError as error:
            mistake = str(error)
        return {"note": [note], "mistake": [mistake], "seconds": [time.perf_counter() - started]}


def make_with_ray(
    config: FeaturizeConfig, settings: StoreSettings, shards: list[Shard]
) -> Iterator[tuple[ShardNote, float]]:
    """Make `shards` by `config.workers` actors; yields each note, and the seconds it took, as it is done.

    Raises InputError as ShardMaker does; what was finished before stays.
    """
    with ray_session():
        import ray

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the caller shows photos, which Ray knows nothing of
        have = ray.cluster_resources()
        workers = min(config.workers, len(shards))
        # More than the cluster has would wait for ever.
        cpus = min(config.threads or 1, have.get("CPU", 1) / workers)
        gpus = 0.0 if config.device == "cpu" else min(1.0, have.get("GPU", 0) / workers)
        rows = ray.data.from_items(
            [{"shard": shard.model_dump_json()} for shard in shards], override_num_blocks=len(shards)
        ).map_batches(
            RayShardMaker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus if cpus < 1 else int(cpus),
            num_gpus=gpus,
            fn_constructor_args=(config.model_dump_json(), settings.model_dump_json()),
        )
        for row in rows.iter_rows():
            if row["mistake"]:
                raise InputError(row["mistake"])
            yield ShardNote.model_validate_json(row["note"]), row["seconds"]
