"""The batches of a training run, in an order that depends on its seed alone."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from la.device import pick_device
from la.episodes.batch import EpisodeBatch
from pipelines.config import TrainConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import EpisodeShards

AHEAD = 2  # batches


def read_ahead(
    config: TrainConfig, sources: Sequence[tuple[EpisodeShards, BatchBuilder]], rank: int, world: int, step: int
) -> Iterator[tuple[list[int], EpisodeBatch, Tensor]]:
    """(positions in the step, batch, truth) of every step from `step` on, made by a thread while the step before runs.

    Step s takes one source and one (B, N, K) for all workers, and as many batches as there are workers, whose episodes
    are shared out. Each source and tuple has its own sequence of batches, so shapes are equal on all ranks whatever
    their number.
    """
    taken: Counter[tuple[int, int]] = Counter()
    pinned = pick_device(config.device).type == "cuda"

    def source_and_group(step: int) -> tuple[int, int]:
        source = pure_number(config.seed, step, "source") % len(sources)
        return source, pure_number(config.seed, step) % len(config.batches)

    def load(source: int, group: int, number: int) -> tuple[list[int], EpisodeBatch, Tensor]:
        shards, builder = sources[source]
        positions, drawn = shards.share(group, number, rank, world)
        batch, truth = builder.pack(drawn), builder.truth(drawn)
        return (positions, batch.pin_memory(), truth.pin_memory()) if pinned else (positions, batch, truth)

    taken.update(source_and_group(past) for past in range(step))
    with ThreadPoolExecutor(1) as executor:
        ahead = []
        while True:
            while len(ahead) < AHEAD:
                kind = source_and_group(step)
                ahead.append(executor.submit(load, *kind, taken[kind]))
                taken[kind] += 1
                step += 1
            yield ahead.pop(0).result()


def pure_number(*parts: int | str) -> int:
    """A number below 2**53 that is a pure function of `parts`."""
    return int(random.Random("/".join(map(str, parts))).random() * 2**53)
