"""The batches of a training run, in an order that depends on its seed alone."""

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Lock

from torch import Tensor

from la.device import pick_device
from la.episodes.batch import EpisodeBatch
from pipelines.config import TrainConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import EpisodeShards
from pipelines.store.buffers import Buffers

THREADS = 4  # at most; on the CPU, which has a model to compute, one
Source = tuple[EpisodeShards, BatchBuilder]


def read_ahead(
    config: TrainConfig, sources: Sequence[Source], rank: int, world: int, step: int
) -> Iterator[tuple[list[int], EpisodeBatch, Tensor]]:
    """(positions in the step, batch, truth) from `step` on, `accumulate` a step, made by threads while training runs.

    Step s takes one source and one (B, N, K) for all workers, and `accumulate` times as many batches as there are
    workers, whose episodes are shared out. Each source and tuple has its own sequence of batches, so shapes are equal
    on all ranks whatever their number, and two batches of a step are those of two workers.
    """
    Buffers.pinned = pinned = pick_device(config.device).type == "cuda"
    threads, reading = min(THREADS, os.cpu_count() or 1) if pinned else 1, Lock()

    def load(source: int, group: int, number: int, part: int) -> tuple[list[int], EpisodeBatch, Tensor]:
        shards, builder = sources[source]
        with reading:
            places, drawn = shards.share(group, number * config.accumulate + part, rank, world)
        positions = [place + part * world * config.batches[group][0] for place in places]
        batch, truth = builder.pack(drawn), builder.truth(drawn)
        return (positions, batch.pin_memory(), truth.pin_memory()) if pinned else (positions, batch, truth)

    def order() -> Iterator[tuple[int, int, int, int]]:
        taken = Counter(_source_and_group(config, sources, past) for past in range(step))
        for coming in count(step):
            kind = _source_and_group(config, sources, coming)
            yield from ((*kind, taken[kind], part) for part in range(config.accumulate))
            taken[kind] += 1

    with ThreadPoolExecutor(threads) as executor:
        jobs = order()
        ahead = [executor.submit(load, *next(jobs)) for _ in range(threads + 1)]
        while True:
            yield ahead.pop(0).result()
            ahead.append(executor.submit(load, *next(jobs)))


def photos_of_step(
    config: TrainConfig, sources: Sequence[Source], world: int, step: int
) -> tuple[BatchBuilder, list[int]]:
    """(what reads them, ids) of the photos in a step's episodes, over all workers."""
    kind = _source_and_group(config, sources, step)
    number = sum(_source_and_group(config, sources, past) == kind for past in range(step))
    (shards, builder), batches = sources[kind[0]], config.accumulate * world
    episodes = [e for part in range(batches) for e in shards.batch(kind[1], number * batches + part)]
    return builder, sorted({photo for e in episodes for photo in (e.query, *e.supports)})


def _source_and_group(config: TrainConfig, sources: Sequence[Source], step: int) -> tuple[int, int]:
    source = pure_number(config.seed, step, "source") % len(sources)
    return source, pure_number(config.seed, step) % len(config.batches)


def pure_number(*parts: int | str) -> int:
    """A number below 2**53 that is a pure function of `parts`."""
    return int(random.Random("/".join(map(str, parts))).random() * 2**53)
