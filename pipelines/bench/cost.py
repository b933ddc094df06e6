"""What a study costs before it is run: disk, reading, hours, and which of compute, disk and memory is the bottleneck.

Arithmetic alone: rates come from `pipelines.bench.rates`, which measures them here, or from whoever has measured them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from la.errors import InputError
from pipelines.config import StoredDtype

Kind = tuple[int, int, int]  # (B, N, K) of a training batch on one worker
Task = tuple[int, int]  # ways, shots

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


def images_of(kind: Kind) -> int:
    """Photos whose features a batch reads: B queries with N x K supports each, where classes have photos enough."""
    size, ways, shots = kind
    return size * (1 + ways * shots)


def images_per_step(batches: Sequence[Kind]) -> float:
    """Photos that a worker reads in a step, the mean over the kinds of batches, each as likely."""
    return sum(map(images_of, batches)) / len(batches)


@dataclass(frozen=True)
class TrainRates:
    """How fast one worker trains with features in memory, in seconds."""

    step_seconds: float  # of a step
    start_seconds: float = 0.0  # from the start to the first step
    draw_seconds: float = 0.0  # of drawing an episode
    evaluate_seconds: Mapping[Task, float] | float = 0.0  # of one episode of a task; a number: of each of its photos
    evaluate_start_seconds: float = 0.0  # what an evaluation takes beside its episodes

    def with_photos(self, photos: float, batches: Sequence[Kind]) -> "TrainRates":
        """The rates where steps read so many photos, fewer than their batches ask for: a step goes with its photos."""
        return replace(self, step_seconds=self.step_seconds * photos / images_per_step(batches))

    def episode(self, task: Task) -> float:
        """Seconds of one episode of a task; where it was not measured, by its photos, from the most like it."""
        if not isinstance(self.evaluate_seconds, Mapping):
            return self.evaluate_seconds * _photos(task)
        near = min(self.evaluate_seconds, key=lambda known: abs(_photos(known) - _photos(task)))
        return self.evaluate_seconds[near] * _photos(task) / _photos(near)


def _photos(task: Task) -> int:
    return images_of((1, *task))


def rates_of_steps(steps_per_second: float, batches: Sequence[Kind]) -> TrainRates:
    """Rates of which the steps a second alone are known: an evaluation is taken to cost a photo what training does."""
    return TrainRates(1 / steps_per_second, evaluate_seconds=1 / steps_per_second / images_per_step(batches))


@dataclass(frozen=True)
class Cluster:
    """Where it runs. `read_mb` is the MB (1e6 bytes) a second that a node reads, and writes, past its page cache."""

    read_mb: float
    workers: int = 1
    nodes: int = 1
    ram_gb: float = 64.0  # of each node, 1e9 bytes

    def __post_init__(self) -> None:
        if self.nodes > self.workers:
            raise InputError(
                f"--nodes is {self.nodes}, but --workers is {self.workers}: a node has at least one worker. "
                "Lower --nodes or raise --workers."
            )

    @property
    def workers_per_node(self) -> int:
        """Of the fullest node, for which the others wait."""
        return -(-self.workers // self.nodes)

    def cached(self, store: int) -> float:
        """Share of a store of so many bytes that a node's page cache holds; what is drawn at random misses the rest."""
        return min(1.0, CACHE_SHARE * self.ram_gb * 1e9 / store)


@dataclass(frozen=True)
class Stage:
    """Hours of one stage and what holds it up; `read_mb` is what a node reads (or writes) a second meanwhile."""

    name: str
    hours: float
    bottleneck: str
    read_mb: float


def plan_featurizing(images: int, features: int, rate: float, cluster: Cluster) -> Stage:
    """`rate`: photos a second of one worker. Writing the features keeps pace, or is the bottleneck."""
    compute = cluster.workers * rate
    disk = cluster.nodes * cluster.read_mb * 1e6 / features
    pace = min(compute, disk)
    held_up = "compute" if compute <= disk else "disk: the features cannot be written as fast as they are made"
    return Stage("featurize", images / pace / 3600, held_up, pace * features / 1e6 / cluster.nodes)


@dataclass(frozen=True)
class Training:
    """One training, and the tasks it is evaluated on, each with its number of episodes."""

    batches: tuple[Kind, ...]
    steps: int
    val_every: int
    val_episodes: int
    rates: TrainRates
    drawn: int = 0  # episodes drawn before it starts, once for each fold
    tasks: tuple[tuple[Task, int], ...] = ()
    photos: float | None = None  # that a worker reads in a step, where classes have not photos enough for K shots

    @property
    def photos_a_step(self) -> float:
        """Photos that a worker reads in a step."""
        return images_per_step(self.batches) if self.photos is None else self.photos

    def step_seconds(self, features: int, store: int, cluster: Cluster) -> tuple[float, float]:
        """(compute, reading) of a step on the fullest node; reading runs ahead of the model, so the longer one counts.

        Only what the page cache misses is read from the disk, by all workers of a node together.
        """
        missed = self.photos_a_step * features * (1 - cluster.cached(store))
        return self.rates.step_seconds, cluster.workers_per_node * missed / (cluster.read_mb * 1e6)

    def seconds(self, features: int, store: int, cluster: Cluster) -> float:
        """Of drawing its episodes and training with its validations, without the evaluation of its tasks."""
        rates = self.rates
        validating = -(-self.steps // self.val_every) * self.val_episodes * rates.episode((1, 1))
        before = self.drawn * rates.draw_seconds + rates.start_seconds
        return before + self.steps * max(self.step_seconds(features, store, cluster)) + validating

    @property
    def evaluating(self) -> float:
        """Seconds of evaluating its tasks."""
        rates = self.rates
        return sum(rates.evaluate_start_seconds + count * rates.episode(task) for task, count in self.tasks)


def plan_training(name: str, trainings: Sequence[Training], features: int, store: int, cluster: Cluster) -> Stage:
    """The trainings one after the other, each on all workers, whose batches are their own as in the paper."""
    seconds = sum(t.seconds(features, store, cluster) + t.evaluating for t in trainings)
    return Stage(name, seconds / 3600, *_held_up(trainings, features, store, cluster))


def plan_sweep(name: str, trials: Sequence[Training], features: int, store: int, cluster: Cluster) -> Stage:
    """The trials side by side, one on each worker: never faster than the longest of them."""
    each = [t.seconds(features, store, cluster) + t.evaluating for t in trials]
    seconds = max(sum(each) / cluster.workers, max(each))
    stage = Stage(name, seconds / 3600, *_held_up(trials, features, store, cluster))
    if stage.bottleneck == "compute" and sum(t.evaluating for t in trials) > sum(each) / 2:
        return Stage(stage.name, stage.hours, "compute, more than half of it evaluation", stage.read_mb)
    return stage


def _held_up(trainings: Sequence[Training], features: int, store: int, cluster: Cluster) -> tuple[str, float]:
    """(bottleneck, MB that a node's workers take in a second, from its page cache or its disk)"""
    compute, reading, taken = 0.0, 0.0, 0.0
    for training in trainings:
        one, other = training.step_seconds(features, store, cluster)
        compute += training.steps * one
        reading += training.steps * other
        taken += training.steps * training.photos_a_step * features
    rate = cluster.workers_per_node * taken / max(compute, reading) / 1e6
    if reading <= compute:
        return "compute", rate
    return f"disk: {cluster.ram_gb:.0f} GB of memory cache {100 * cluster.cached(store):.0f} % of the store", rate
