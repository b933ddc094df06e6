"""Episode shards: drawing, writing and reading them. The same arguments give the same episodes, always."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from la.data.coco import Dataset
from la.data.folds import FoldLists, fold_classes
from la.episodes.protocols import QueryDraw, protocol_of
from la.episodes.retrieval import SupportIndex, descriptor
from la.episodes.sampling import MIN_AREA, Episode, Pool, Retrieve, evaluation_episode, training_episode
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


@dataclass(frozen=True)
class EpisodePlan:
    """What a set of episode shards holds. Two equal plans on equal annotations are the same episodes."""

    protocol: str  # "la-train", or that of testing and "-test"
    fold: int
    split: str  # "train" or "val"
    classes: str  # "seen", "unseen" or "all"
    seed: int
    batches: tuple[tuple[int, int, int], ...]  # (B, N, K), one group of shards each; testing has one, B = 1
    count: int  # batches of each group
    prompt: str | None = None  # kind of prompt in testing
    mixed: tuple[str, ...] = ()  # kinds of prompt in training
    varied: bool = False  # whether shots vary from class to class in testing
    fold_lists: FoldLists = "interleaved"
    query_draw: QueryDraw = "class"
    min_area: int = MIN_AREA
    selection: str = "random"  # or "nearest": how the supports of a class are chosen in testing
    without: tuple[str, ...] = ()  # names of classes that are left out

    @property
    def name(self) -> str:
        return f"{self.protocol}/fold{self.fold}/{self.split}/{self.classes}/seed{self.seed}"

    def folder(self, store: FeatureStore) -> Path:
        drawn_by = [store.key] if self.selection == "nearest" else []  # by features, all else by annotations
        key = digest([FORMAT, store.dataset(self.split).digest, self.__dict__, *drawn_by])
        kind = f"protocol={self.protocol}/fold={self.fold}/split={self.split}"
        return store.path.parents[1] / "episodes" / kind / key


def training_plan(config: TrainConfig) -> EpisodePlan:
    count = -(-config.train_batches // len(config.batches))
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
        size, ways, shots = self._plan.batches[group]
        part, row_group = divmod(position % self._plan.count, _batches_per_part(size))
        path = self.folder / _part_name(size, ways, shots, part)
        return [(path, row) for row in rows_of_group(path, self._open(path), row_group, size)]

    def __iter__(self) -> Iterator[Episode]:
        for size, ways, shots in self._plan.batches:
            left = self._plan.count
            for part in range(-(-left // _batches_per_part(size))):
                path = self.folder / _part_name(size, ways, shots, part)
                file, wanted = open_part(path), size * min(left, _batches_per_part(size))
                if file.metadata.num_rows != wanted:
                    raise damaged_episodes(path, f"it has {file.metadata.num_rows} episodes, not {wanted}")
                left -= _batches_per_part(size)
                for rows in rows_of_part(path, file):
                    yield from (to_episode(path, row, self._dataset) for row in rows)


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
    """The shards of `plan`, drawn and written where they are not there yet.

    `workers` processes draw parts side by side; parts that an earlier, killed run finished are kept.
    """
    folder = plan.folder(store)
    if not (folder / "manifest.json").exists():
        jobs = []
        for group, (size, ways, shots) in enumerate(plan.batches):
            per_part = _batches_per_part(size)
            for part, first in enumerate(range(0, plan.count, per_part)):
                last = min(plan.count, first + per_part)
                path = folder / _part_name(size, ways, shots, part)
                jobs.append((plan, store.path, group, first * size, last * size, size, path))
        if workers > 1:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
                digests = list(executor.map(_write_part, *zip(*jobs, strict=True)))
        else:
            digests = [_write_part(plan, store, *job[2:]) for job in jobs]
        pool = pool_of(plan, store)
        most_shots = max(k for _, _, k in plan.batches) if plan.prompt else 1
        manifest = {
            "format": FORMAT,
            "plan": plan.__dict__,
            "dataset_digest": store.dataset(plan.split).digest,
            "min_area_px": plan.min_area,
            "episodes": sum(size * plan.count for size, _, _ in plan.batches),
            "classes_drawn": pool.usable(most_shots),
            "classes_skipped": pool.skipped(most_shots),
            "digest": digest(digests, 16),
        }
        write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return EpisodeShards(folder, plan, store.dataset(plan.split))


def _write_part(
    plan: EpisodePlan, store: FeatureStore | Path, group: int, start: int, stop: int, size: int, path: Path
) -> str:
    """Draw and write one part, one row group a training batch; returns its content digest."""
    if path.exists():
        return digest_of_part(path)
    store = FeatureStore(store) if isinstance(store, Path) else store
    episodes = draw(plan, store, group, start, stop)
    content = hashlib.sha256(json.dumps(episodes).encode()).hexdigest()
    rows = [e._asdict() | {"pairs": [p._asdict() for p in e.pairs]} for e in episodes]
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"digest": content})
    row_group = size if plan.prompt is None else 64  # training reads batches at random, testing all in order
    options = {
        "row_group_size": row_group,
        "compression": "zstd",
        "write_statistics": False,
        "write_page_checksum": True,
    }
    write_whole(path, lambda temporary: pq.write_table(table, temporary, **options))
    return content


def _batches_per_part(size: int) -> int:
    return max(1, ROWS_PER_PART // size)


def _part_name(size: int, ways: int, shots: int, part: int) -> str:
    return f"b{size}-n{ways}-k{shots}-{part:05d}.parquet"
