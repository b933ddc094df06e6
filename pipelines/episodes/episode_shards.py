"""Episode shards: drawing, writing and reading them. The same arguments give the same episodes, always."""

import hashlib
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from la.data.coco import Dataset
from la.data.folds import FoldLists, fold_classes
from la.episodes.pool import MIN_AREA, Pool
from la.episodes.protocols import protocol_of
from la.episodes.retrieval import SupportIndex, descriptor
from la.episodes.sampling import Episode, Retrieve, evaluation_episode, training_episode
from la.errors import InputError
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.episodes.episode_rows import (
    FORMAT,
    SCHEMA,
    damaged_episodes,
    digest_of_part,
    open_part,
    read_manifest,
    rows_of_group,
    rows_of_part,
    to_episode,
)
from pipelines.store.reader import FeatureStore
from pipelines.workspace import digest, write_text, write_whole

ROWS_PER_PART = 4096
DRAWERS = 8  # ranks of which one draws
STEPS_AHEAD = 64  # of a group, at least, that are asked for before they are read
PATIENCE = 60.0  # seconds that a part of another process is waited for; then it is drawn here


class Part(NamedTuple):
    """A file of episodes start..stop-1 of a group, `size` a batch."""

    name: str
    group: int
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class EpisodePlan:
    """What a set of episode shards holds. Two equal plans on equal annotations are the same episodes."""

    protocol: str  # "la-train", or that of testing and "-test"
    fold: int
    split: str  # "train" or "val"
    classes: str  # "seen", "unseen" or "all"
    seed: int
    batches: tuple[tuple[int, int, int], ...]  # (B, N, K), one group of shards each; testing has one, B = 1
    count: int | None  # batches of each group; None: without end, drawn while they are read
    prompt: str | None = None  # kind of prompt in testing
    mixed: tuple[str, ...] = ()  # kinds of prompt in training
    varied: bool = False  # whether shots vary from class to class in testing
    fold_lists: FoldLists = "interleaved"
    query_draw: str = "class"
    min_area: int = MIN_AREA
    selection: str = "random"  # or "nearest": how the supports of a class are chosen in testing
    without: tuple[str, ...] = ()  # names of classes that are left out

    @property
    def name(self) -> str:
        return f"{self.protocol}/fold{self.fold}/{self.split}/{self.classes}/seed{self.seed}"

    def batches_a_part(self, group: int) -> int:
        """Batches in each part of a group but its last."""
        return max(1, ROWS_PER_PART // self.batches[group][0])

    def part(self, group: int, number: int) -> "Part":
        """Part `number` of a group."""
        size, ways, shots = self.batches[group]
        full = self.batches_a_part(group)
        stop = (number + 1) * full if self.count is None else min((number + 1) * full, self.count)
        name = f"b{size}-n{ways}-k{shots}-{number:05d}.parquet"
        return Part(name, group, number * full * size, stop * size, size)

    @property
    def parts(self) -> list["Part"]:
        """All parts; of a plan without end the first of each group, which are drawn with its manifest."""
        groups = range(len(self.batches))
        return [self.part(g, n) for g in groups for n in range(-(-(self.count or 1) // self.batches_a_part(g)))]

    @property
    def episodes(self) -> int:
        """Number of episodes in `parts`."""
        return sum(part.stop - part.start for part in self.parts)

    def folder(self, store: FeatureStore) -> Path:
        drawn_by = [store.key] if self.selection == "nearest" else []  # by features, all else by annotations
        key = digest([FORMAT, store.dataset(self.split).digest, self.__dict__, *drawn_by])
        kind = f"protocol={self.protocol}/fold={self.fold}/split={self.split}"
        return store.path.parents[1] / "episodes" / kind / key


def training_plan(config: TrainConfig) -> EpisodePlan:
    count = config.train_batches and -(-config.train_batches // len(config.batches))
    drawn = {"batches": config.batches, "count": count, "mixed": config.prompts, "fold_lists": config.fold_lists}
    return EpisodePlan("la-train", config.fold, "train", config.classes, config.seed, **drawn)


def evaluation_plan(config: EvaluateConfig, seed: int, fold_lists: FoldLists | None = None) -> EpisodePlan:
    """Raises InputError for an unknown protocol. `fold_lists`: others than the protocol's."""
    protocol = protocol_of(config.protocol)
    return EpisodePlan(
        f"{protocol.name}-test",
        config.fold,
        config.split,
        config.classes,
        seed,
        ((1, config.ways, config.shots),),
        config.episodes,
        config.prompt,
        varied=config.supports == "varied",
        fold_lists=fold_lists or protocol.folds,
        query_draw=protocol.query,
        min_area=protocol.min_area,
        selection=config.support_selection,
    )


def training_plan_of_another(config: TrainConfig, store: FeatureStore, other: FeatureStore) -> EpisodePlan:
    """Training episodes on the photos of another store, of all classes it labels but those that stay unseen.

    Raises InputError where its features are not like those of `store`.
    """
    for name in ("backbone", "weights", "image_size", "preprocessing", "layer"):
        ours, theirs = (getattr(s.info.settings, name) for s in (store, other))
        if ours != theirs:
            raise InputError(
                f"--also {other.path.parents[1]} was featurized with {name} {theirs}, but the store trained on with "
                f"{ours}. Run `featurize` there with the same settings."
            )
    categories = store.dataset("train").categories
    unseen = fold_classes(categories, config.fold, config.fold_lists)[1] if config.classes == "seen" else []
    without = tuple(sorted(categories[c] for c in unseen))
    return replace(training_plan(config), classes="all", without=without)


@lru_cache(maxsize=8)
def _pool(
    store: FeatureStore, split: str, fold: int, classes: str, lists: FoldLists, min_area: int, without: tuple[str, ...]
) -> Pool:
    return pool_on(store.dataset(split), fold, classes, lists, min_area, without)


def pool_on(
    dataset: Dataset,
    fold: int,
    classes: str,
    lists: FoldLists,
    min_area: int = MIN_AREA,
    without: tuple[str, ...] = (),
) -> Pool:
    """The photos of a data set and the classes of a fold, "seen", "unseen" or "all"."""
    seen, unseen = fold_classes(dataset.categories, fold, lists)
    chosen = {"seen": seen, "unseen": unseen, "all": [*seen, *unseen]}[classes]
    return Pool(dataset, [c for c in chosen if dataset.categories[c] not in without], min_area)


def pool_of(plan: EpisodePlan, store: FeatureStore) -> Pool:
    return _pool(store, plan.split, plan.fold, plan.classes, plan.fold_lists, plan.min_area, plan.without)


@lru_cache(maxsize=2)
def _retrieval(store: FeatureStore, split: str) -> Retrieve:
    """The photos of a split most like a query; reads every photo's features once."""
    ids = store.image_ids(split)
    descriptors = torch.cat([descriptor(store.read_batch([photo])) for photo in ids])
    place, index = {photo: n for n, photo in enumerate(ids)}, SupportIndex(ids, descriptors)
    return lambda query, among, count: index.nearest(descriptors[place[query]], count, among)


def draw(plan: EpisodePlan, store: FeatureStore, group: int, start: int, stop: int) -> list[Episode]:
    """Episodes start..stop-1 of a group; raises InputError where classes or images are too few."""
    pool = pool_of(plan, store)
    _, ways, shots = plan.batches[group]
    if plan.prompt is None:
        return [training_episode(pool, plan.name, i, ways, shots, plan.mixed) for i in range(start, stop)]
    retrieve = _retrieval(store, plan.split) if plan.selection == "nearest" else None
    how = (ways, shots, plan.prompt, plan.varied, plan.query_draw, retrieve)
    return [evaluation_episode(pool, plan.name, i, *how) for i in range(start, stop)]


def repeated(episode: Episode, times: int) -> Episode:
    """The episode with its supports `times` over: as many shots without as many photos of a class."""
    length = len(episode.supports)
    pairs = [p._replace(support=p.support + n * length) for n in range(times) for p in episode.pairs]
    return episode._replace(supports=episode.supports * times, pairs=tuple(pairs))


class EpisodeShards:
    """The written episodes of `plan` on the photos of `dataset`, read one batch at a time.

    Raises InputError from any member for files that are missing, damaged or of another data set.
    """

    def __init__(self, folder: Path, plan: EpisodePlan, dataset: Dataset):
        self.folder = folder
        self.manifest = read_manifest(folder, plan.__dict__, dataset)
        self._plan = plan
        self._dataset = dataset
        self._open = lru_cache(maxsize=16)(open_part)  # an open part takes some 6 MB; training is in one of each group

    @property
    def digest(self) -> str:
        return self.manifest["digest"]

    def batch(self, group: int, position: int) -> list[Episode]:
        """Batch `position` of a group, starting over after the last."""
        return self.share(group, position)[1]

    def share(self, group: int, step: int, rank: int = 0, world: int = 1) -> tuple[list[int], list[Episode]]:
        """Of the `world` batches of a step, the episodes of a rank and their places among all of the step.

        Every rank gets as many, and as near as can be as much work, because at a step's end all wait for the slowest.
        """
        found = [row for part in range(world) for row in self._rows(group, step * world + part)]
        shares = dealt([sum(map(_work, row["pairs"])) for _, row in found], world)
        places = shares[(rank + step) % world]  # the first share is often the largest
        return places, [to_episode(*found[place], self._dataset) for place in places]

    def _rows(self, group: int, position: int) -> list[tuple[Path, dict]]:
        position = position if self._plan.count is None else position % self._plan.count
        number, row_group = divmod(position, self._plan.batches_a_part(group))
        part = self._plan.part(group, number)
        path = self._file(part)
        return [(path, row) for row in rows_of_group(path, self._open(path), row_group, part.size)]

    def _file(self, part: Part) -> Path:
        return self.folder / part.name

    def __iter__(self) -> Iterator[Episode]:
        for part in self._plan.parts:
            path, wanted = self._file(part), part.stop - part.start
            file = open_part(path)
            if file.metadata.num_rows != wanted:
                raise damaged_episodes(path, f"it has {file.metadata.num_rows} episodes, not {wanted}")
            for rows in rows_of_part(path, file):
                yield from (to_episode(path, row, self._dataset) for row in rows)


class EpisodeStream(EpisodeShards):
    """Episodes of a plan without end, whose parts are drawn shortly before they are read, by processes beside training.

    One rank of DRAWERS, so about one of each node, has such a process; the others wait for its files. Parts stay on the
    disk: for the run when it goes on, and for others of the same plan, however long.
    """

    def __init__(self, plan: EpisodePlan, store: FeatureStore):
        super().__init__(plan.folder(store), plan, store.dataset(plan.split))
        self._store = store
        self._drawer: subprocess.Popen | None = None
        self._asked: set[str] = set()  # names of parts that are being drawn

    def share(self, group: int, step: int, rank: int = 0, world: int = 1) -> tuple[list[int], list[Episode]]:
        full = self._plan.batches_a_part(group)
        last = (step + 1) * world - 1 + max(full // 2, STEPS_AHEAD * world)
        for number in range(step * world // full, last // full + 1):
            turn = (group + number) % -(-world // DRAWERS) * DRAWERS
            part = self._plan.part(group, number)
            if rank == turn and part.name not in self._asked and not (self.folder / part.name).exists():
                self._asked.add(part.name)
                self._ask(part)
        return super().share(group, step, rank, world)

    def _file(self, part: Part) -> Path:
        path, until = super()._file(part), time.monotonic() + PATIENCE
        while not path.exists():
            ended = part.name in self._asked and self._drawer.poll() is not None
            if ended or time.monotonic() > until:  # if its disk is full, this one says so
                _write_part(self._plan, self._store, self.folder, part)
            time.sleep(0.05)
        self._asked.discard(part.name)
        return path

    def _ask(self, part: Part) -> None:
        if self._drawer is None:
            program = f"from {__name__} import draw_on_request; draw_on_request()"
            # not of this session, so that Ctrl-C is this process's to answer; it ends when its input is closed
            settings = {"cwd": Path(__file__).parents[2], "stdin": subprocess.PIPE, "start_new_session": True}
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self._drawer = subprocess.Popen([sys.executable, "-c", program], bufsize=0, **settings, **quiet)
            weakref.finalize(self, self._drawer.stdin.close)
            self._write_line([self._plan.__dict__, str(self._store.path), str(self.folder)])
        self._write_line(part)

    def _write_line(self, content: object) -> None:
        with suppress(BrokenPipeError):
            self._drawer.stdin.write(f"{json.dumps(content)}\n".encode())


def draw_on_request() -> None:
    """What a drawing process does: write the parts that it reads from its input, a line each, until that ends."""
    os.nice(5)
    settings, path, folder = json.loads(sys.stdin.readline())
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    plan = EpisodePlan(**settings | lists | {"batches": tuple(map(tuple, settings["batches"]))})
    store = FeatureStore(Path(path))
    for line in sys.stdin:
        _write_part(plan, store, Path(folder), Part(*json.loads(line)))


def _work(pair: dict) -> int:
    """The time LA takes for a pair: points and boxes are encoded by attention, which is half as much again."""
    return 3 if pair["points"] or pair["boxes"] else 2


def dealt(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """For each rank the places of its costs, as many for every rank: the highest first, each to who has least."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    total = [0] * ranks
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        rank = min((r for r in range(ranks) if len(shares[r]) < len(costs) // ranks), key=total.__getitem__)
        shares[rank].append(place)
        total[rank] += costs[place]
    return [sorted(share) for share in shares]


def ensure_episodes(plan: EpisodePlan, store: FeatureStore, workers: int = 0) -> EpisodeShards:
    """The shards of `plan`, drawn and written where they are not there yet; of a plan without end the first ones.

    `workers` processes draw parts side by side; parts that an earlier, killed run finished are kept.
    """
    folder = plan.folder(store)
    if not (folder / "manifest.json").exists():
        jobs = [(plan, store.path, folder, part) for part in plan.parts]
        if workers > 1:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
                digests = list(executor.map(_write_part, *zip(*jobs, strict=True)))
        else:
            digests = [_write_part(plan, store, folder, part) for part in plan.parts]
        pool = pool_of(plan, store)
        most_shots = max(k for _, _, k in plan.batches) if plan.prompt else 1
        manifest = {
            "format": FORMAT,
            "plan": plan.__dict__,
            "dataset_digest": store.dataset(plan.split).digest,
            "min_area_px": plan.min_area,
            "episodes": plan.episodes,
            "classes_drawn": pool.usable(most_shots),
            "classes_skipped": pool.skipped(most_shots),
            "digest": digest(digests, 16),
        }
        write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return EpisodeStream(plan, store) if plan.count is None else EpisodeShards(folder, plan, store.dataset(plan.split))


def _write_part(plan: EpisodePlan, store: FeatureStore | Path, folder: Path, part: Part) -> str:
    """Draw and write one part, one row group a training batch; returns its content digest."""
    path = folder / part.name
    if path.exists():
        return digest_of_part(path)
    store = FeatureStore(store) if isinstance(store, Path) else store
    episodes = draw(plan, store, part.group, part.start, part.stop)
    content = hashlib.sha256(json.dumps(episodes).encode()).hexdigest()
    rows = [e._asdict() | {"pairs": [p._asdict() for p in e.pairs]} for e in episodes]
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"digest": content})
    row_group = part.size if plan.prompt is None else 64  # training reads batches at random, testing all in order
    options = {
        "row_group_size": row_group,
        "compression": "zstd",
        "write_statistics": False,
        "write_page_checksum": True,
    }
    write_whole(path, lambda temporary: pq.write_table(table, temporary, **options))
    return content
