"""What a study costs before it is run: disk, reading, hours, and which of compute, disk and memory is the bottleneck.

Arithmetic alone: rates come from `pipelines.bench.rates`, which measures them here, or from whoever has measured them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pipelines.config import StoredDtype, TrainConfig

Kind = tuple[int, int, int]  # (B, N, K) of a batch on one worker

# Bytes of a photo's row beside its features: the Parquet page and footer, 469 and 455 in two stores, and its
# annotations and its line of the index, 1,480 in 322 photos of COCO.
ROW_BYTES, ANNOTATION_BYTES = 465, 1480
CACHE_SHARE = 0.8  # of a node's memory that the page cache gets at most; the rest is the workers'


def bytes_per_image(grid: tuple[int, int], channels: int, dtype: StoredDtype) -> int:
    """Bytes of a photo's features in the store: two a value, or one a value and a float16 scale a token."""
    tokens = math.prod(grid)
    return tokens * channels * 2 if dtype == "float16" else tokens * (channels + 2)


def store_bytes(images: int, features: int) -> int:
    """Bytes of a whole store of so many photos, `features` bytes each: shards, annotations and index."""
    return images * (features + ROW_BYTES + ANNOTATION_BYTES)


def images_per_step(batches: Sequence[Kind]) -> float:
    """Photos that a worker reads in a step, the mean over the kinds of batches, each as likely.

    A batch reads B queries with N x K supports each, where classes have photos enough.
    """
    return sum(size * (1 + ways * shots) for size, ways, shots in batches) / len(batches)


class Rates(NamedTuple):
    """How fast one worker is with features in memory, in seconds."""

    step: float  # of a training step
    photo: float  # of each of the 1 + N x K photos of an episode that is evaluated
    draw: float = 0.0  # of drawing an episode


class Job(NamedTuple):
    """One training with its evaluations on one worker, features in memory: its parts in seconds, and what it reads."""

    steps: float
    photos: float  # that all its steps read
    beside: float  # drawing and validating
    evaluating: float = 0.0


def job_of(config: TrainConfig, rates: Rates, photos: float, tested: int = 0) -> Job:
    """The job of these settings. `photos` are read in a training step, `tested` by all its test episodes."""
    batches = config.train_batches or config.steps * config.accumulate
    drawn = batches * sum(size for size, _, _ in config.batches) / len(config.batches)
    validated = 2 * config.val_episodes * -(-config.steps // config.val_every)  # photos, 1-way 1-shot
    beside = drawn * rates.draw + validated * rates.photo
    return Job(config.steps * rates.step, config.steps * photos, beside, tested * rates.photo)


class Stage(NamedTuple):
    """Hours of one stage and what holds it up; `read_mb` is what a node reads (or writes) a second meanwhile."""

    name: str
    hours: float
    read_mb: float
    bottleneck: str


class Cluster(NamedTuple):
    """Where a store of `store` bytes, `features` bytes a photo, is made and read.

    `read_mb` is the MB (1e6 bytes) a second that a node reads, and writes, past its page cache.
    """

    features: int
    store: int
    read_mb: float
    workers: int = 1
    nodes: int = 1
    ram_gb: float = 64.0  # of each node, 1e9 bytes

    @property
    def cached(self) -> float:
        """Share of the store that a node's page cache holds; what is drawn at random misses the rest."""
        return min(1.0, CACHE_SHARE * self.ram_gb * 1e9 / self.store)

    def featurize(self, images: int, rate: float) -> Stage:
        """`rate`: photos a second of one worker. Writing the features keeps pace, or is the bottleneck."""
        compute = self.workers * rate
        disk = self.nodes * self.read_mb * 1e6 / self.features
        pace = min(compute, disk)
        held_up = "compute" if compute <= disk else "disk: the features cannot be written as fast as they are made"
        return Stage("featurize", images / pace / 3600, pace * self.features / 1e6 / self.nodes, held_up)

    def train(self, name: str, jobs: Sequence[Job], at_once: int = 1) -> Stage:
        """Jobs so many `at_once`, never faster than the longest. One at a time is on all workers.

        Batches are each worker's own, as in the paper. Reading runs ahead of the model, so the longer of the two
        counts. Only what the page cache misses is read from the disk, by all workers of a node together, of the
        fullest node, for which the others wait.
        """
        node = -(-self.workers // self.nodes) * self.features / 1e6  # MB of a photo for each of its workers
        photo = node * (1 - self.cached) / self.read_mb
        each = [max(job.steps, job.photos * photo) + job.beside + job.evaluating for job in jobs]
        compute, photos = sum(job.steps for job in jobs), sum(job.photos for job in jobs)
        held_up = "compute"
        if photos * photo > compute:
            held_up = f"disk: {self.ram_gb:.0f} GB of memory cache {100 * self.cached:.0f} % of the store"
        elif sum(job.evaluating for job in jobs) > sum(each) / 2:
            held_up = "compute, more than half of it evaluation"
        hours = max(sum(each) / at_once, *each) / 3600
        return Stage(name, hours, node * photos / max(compute, photos * photo), held_up)
