"""Making shards on a Ray cluster, by three stages of Ray Data: CPU tasks decode, actors featurize, writers write.

A row is a batch of photos of one shard, the very batch that `ShardMaker` would make, so features are the same bit for
bit. The last stage hands each batch to the writer of its shard, an actor of its own that puts batches in order. Every
stage may see a row again after a failure; where a writer dies, all that is unfinished is made again.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel

from la.backbone.vit import Backbone
from la.data.coco import Image
from la.errors import InputError
from pipelines.cluster import gpu_share, node_resources, ray_session, wait_for
from pipelines.config import FeaturizeConfig
from pipelines.remote_path import PathOrUri
from pipelines.store.feature_shards import ShardNote, ShardWriter, StoreSettings, open_shard
from pipelines.store.shard_maker import Shard, decode, described, encode, load

TASKS = 1000  # of decoding, at least, where there are so many batches
PASSES = 5  # in a row that may end without one more shard before somebody has to look

PhotoRow = dict[str, Any]
# What travels from stage to stage: a Batch as JSON, and what the stages make of it; the user's mistakes are text, for
# the driver.
ROW = {"photos": b"", "features": b"", "about": "", "seconds": 0.0, "note": "", "mistake": "", "lost": False}
OnBatch = Callable[[int, float], None]  # (photos, seconds)


class Batch(BaseModel):
    """Where a batch belongs, and its photos; `skipped` are those that could not be used."""

    shard: int  # position among the shards to make
    number: int  # of the batch within its shard
    folder: PathOrUri
    images: list[Image]
    skipped: dict[str, str] = {}


def make_with_ray(
    config: FeaturizeConfig, settings: StoreSettings, shards: list[Shard], advance: OnBatch
) -> Iterator[tuple[Shard, ShardNote]]:
    """Make `shards` with `config.workers` featurizing actors; yields each with its note as it is done.

    Raises InputError as ShardMaker does; what was finished before stays.
    """
    with ray_session() as alone:
        if config.device.startswith("cuda"):
            wait_for(f"--device {config.device}", 1, {"GPU": 1}, alone)
        left, fruitless, seen = dict(enumerate(shards)), 0, set()
        absent = {number for number, shard in left.items() if not shard.file.exists()}  # not so where one is repaired

        def count(batch: Batch, seconds: float) -> None:
            if (batch.shard, batch.number) not in seen:  # made again after a failure, it is no further progress
                seen.add((batch.shard, batch.number))
                advance(len(batch.images) + len(batch.skipped), seconds)

        while left:
            before = len(left)
            for number, note in _one_pass(config, settings, dict(left), count):
                if number in left:  # a task that Ray ran again may tell of a shard once more
                    yield left.pop(number), note
            # a writer may die between finishing a shard and saying so
            for number in [number for number in absent & left.keys() if left[number].file.exists()]:
                shard = left.pop(number)
                yield shard, open_shard(shard.file, settings.key)[1]
            fruitless = fruitless + 1 if len(left) == before else 0
            if fruitless == PASSES:
                raise InputError(
                    f"--workers: the processes that write shards died {PASSES} times without finishing one. Look at "
                    "the memory and disks of the cluster's nodes, then run the same command again: it goes on."
                )


def _one_pass(
    config: FeaturizeConfig, settings: StoreSettings, shards: dict[int, Shard], count: Callable[[Batch, float], None]
) -> Iterator[tuple[int, ShardNote]]:
    """Numbers and notes of shards as they are finished, until all are or a writer dies."""
    import ray

    logging.getLogger("ray.data._internal").setLevel(logging.ERROR)  # Ray sets that of ray.data itself
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller shows photos, which Ray knows nothing of
    actors = min(config.workers, len(shards))
    share = share_of(config, actors, node_resources())
    plan = ray.put(shards)
    start = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(Writer).remote
    writers = [start(settings, plan) for _ in range(actors)]
    rows = [
        ROW | {"batch": Batch(shard=k, number=number, folder=shard.photos, images=images).model_dump_json()}
        for k, shard in shards.items()
        for number, images in enumerate(shard.batches(config.batch_size))
    ]
    stages = (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), max(TASKS, len(rows) // 16)))
        # a size of its own: stages of one size become one, on the CPUs of the model
        .map(
            decode_row,
            compute=ray.data.TaskPoolStrategy(size=actors + share.decoders),
            num_cpus=share.decoding,
            fn_args=(config,),
        )
        .map(
            Encode,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            fn_constructor_args=(config,),
        )
        .map(write_row, compute=ray.data.TaskPoolStrategy(size=actors), num_cpus=0, fn_args=(writers,))
    )
    try:
        for row in stages.iter_rows():
            if row["mistake"]:
                raise InputError(row["mistake"])
            if row["lost"]:
                return
            batch = Batch.model_validate_json(row["batch"])
            count(batch, row["seconds"])
            if row["note"]:
                yield batch.shard, ShardNote.model_validate_json(row["note"])
    finally:
        with suppress(ray.exceptions.RayError):  # of one that died, or hangs on its disk
            ray.get([writer.close.remote() for writer in writers], timeout=10)
        for writer in writers:
            ray.kill(writer)


class ShardShare(NamedTuple):
    """CPUs of a decoding task, how many CPUs there are to decode, and CPUs and GPUs of a featurizing actor."""

    decoding: float
    decoders: int
    cpus: float
    gpus: float


def share_of(config: FeaturizeConfig, actors: int, nodes: list[dict[str, float]]) -> ShardShare:
    """No more than the cluster's nodes have, or a stage would wait for ever."""
    gpu = gpu_share(config.device, actors, nodes)
    hosts = [node for node in nodes if node.get("GPU")] if gpu else nodes
    all_cpus = sum(node.get("CPU", 0) for node in nodes) or 1
    decoding = min(1, all_cpus / 2)  # a CPU is kept for it, or a part where there is one alone
    host = max(node.get("CPU", 0) for node in hosts) or 1
    cpus = min(config.threads or 1, host, (all_cpus - decoding) / actors)
    if gpu:
        cpus = min(cpus, 1)  # the GPU does the work
    return ShardShare(decoding, max(1, int(all_cpus)), cpus if cpus < 1 else int(cpus), gpu)


def decode_row(row: PhotoRow, config: FeaturizeConfig) -> PhotoRow:
    """A task of Ray Data: the batch gets `photos`, their bytes."""
    batch = Batch.model_validate_json(row["batch"])
    try:
        decoded = decode(config, batch.folder, batch.images)
    except InputError as error:
        return row | {"mistake": str(error)}
    usable = batch.model_copy(update={"images": decoded.images, "skipped": decoded.skipped})
    return row | {"batch": usable.model_dump_json(), "photos": decoded.photos.numpy().tobytes()}


class Encode:
    """An actor of Ray Data, with the backbone: `photos` become `features`, their bytes, and `about` the backbone."""

    def __init__(self, config: FeaturizeConfig):
        self.config = config

    @cached_property
    def backbone(self) -> Backbone:
        return load(self.config)

    def __call__(self, row: PhotoRow) -> PhotoRow:
        made = row | {"photos": b""}
        if row["mistake"]:
            return made
        side = self.config.image_size
        photos = torch.from_numpy(np.frombuffer(row["photos"], np.uint8).copy()).view(-1, 3, side, side)
        try:
            backbone = self.backbone  # loading is no part of the rate
            started = time.perf_counter()
            features = encode(backbone, Batch.model_validate_json(row["batch"]).images, photos)
        except InputError as error:
            return made | {"mistake": str(error)}
        about = json.dumps(described(backbone))
        return made | {"features": features.tobytes(), "about": about, "seconds": time.perf_counter() - started}


def write_row(row: PhotoRow, writers: list) -> PhotoRow:
    """A task of Ray Data: hands a batch to the writer of its shard; `note` is the shard's once it is finished."""
    import ray

    done = row | {"features": b""}
    if row["mistake"]:
        return done
    writer = writers[Batch.model_validate_json(row["batch"]).shard % len(writers)]
    try:
        return done | {"note": ray.get(writer.add.remote(row["batch"], row["about"], row["features"]))}
    except InputError as error:
        return done | {"mistake": str(getattr(error, "cause", error))}
    except ray.exceptions.RayActorError:
        return done | {"lost": True}


class Writer:
    """An actor that writes some of the shards, each from batches that come in any order, and some of them twice."""

    def __init__(self, settings: StoreSettings, shards: dict[int, Shard]):
        self.settings, self.shards = settings, shards
        self.begun: dict[int, _Begun] = {}
        self.notes: dict[int, str] = {}

    def add(self, batch: str, about: str, features: bytes) -> str:
        """Take a batch; returns the note of its shard once that is finished, and nothing before."""
        came = Batch.model_validate_json(batch)
        if came.shard in self.notes:
            return self.notes[came.shard]
        shard = self.shards[came.shard]
        if came.shard not in self.begun:
            self.begun[came.shard] = _Begun(shard, self.settings)
        backbone = json.loads(about)
        begun = self.begun[came.shard]
        begun.add(came, np.frombuffer(features, np.float16).reshape(-1, *backbone["grid"], backbone["channels"]))
        if begun.missing:
            return ""
        note = begun.file.finish(shard.note(self.settings, begun.skipped, backbone))
        del self.begun[came.shard]
        self.notes[came.shard] = note.model_dump_json()
        return self.notes[came.shard]

    def close(self) -> None:
        """Leave nothing of the shards that were begun."""
        for begun in self.begun.values():
            with begun.file:
                pass


class _Begun:
    """A shard of which some batches are written, and others wait for those before them."""

    def __init__(self, shard: Shard, settings: StoreSettings):
        self.file = ShardWriter(shard.file, settings)
        self.missing = len(shard.images)  # photos
        self.skipped: dict[str, str] = {}
        self._next = 0
        self._waiting: dict[int, tuple[Batch, np.ndarray]] = {}

    def add(self, batch: Batch, features: np.ndarray) -> None:
        if batch.number >= self._next:
            self._waiting[batch.number] = (batch, features)
        while self._next in self._waiting:
            batch, features = self._waiting.pop(self._next)
            for image, row in zip(batch.images, features, strict=True):
                self.file.add(image, row)
            self.skipped |= batch.skipped
            self.missing -= len(batch.images) + len(batch.skipped)
            self._next += 1
