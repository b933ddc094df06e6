"""Speed as a ratio of two ways measured in turn in one run, so that the machine and its load cancel out."""

import importlib.metadata
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from la.data.coco import find_splits, load_coco
from la.data.photos import read_photo
from la.device import autocast
from la.episodes.sampling import Episode
from la.errors import InputError
from la.evaluation.metrics import FewShotIoU
from la.model.decoder import segment
from la.model.label_anything import build, preset
from pipelines.config import EvaluateConfig, FeaturizeConfig, TrainConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import EpisodeShards, draw, ensure_episodes, evaluation_plan, training_plan
from pipelines.evaluation.evaluate import score, tasks_of
from pipelines.evaluation.shared_work import predictor
from pipelines.store.featurize import store_settings
from pipelines.store.reader import FeatureStore
from pipelines.store.shard_maker import Shard, ShardMaker


@dataclass(frozen=True)
class BenchResult:
    """One comparison: `ratio` against the bar, which it must reach ("at least") or not pass ("at most")."""

    name: str
    ratio: float
    bar: float
    sense: str  # "at least" or "at most"
    details: dict[str, float | str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.ratio >= self.bar if self.sense == "at least" else self.ratio <= self.bar

    def __str__(self) -> str:
        figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.details.items())
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.name}: ratio {self.ratio:.3f}, bar {self.sense} {self.bar:g}: {verdict} ({figures})"


def machine() -> dict[str, str | int | float]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory GB": round(memory_gb(), 1),
        "gpus": ", ".join(gpus) or "none",
        "system": platform.platform(),
        **{name: importlib.metadata.version(name) for name in ("torch", "ray", "pyarrow", "timm")},
    }


def memory_gb() -> float:
    """Memory of this machine in 1e9 bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def workspace_beside(store: Path, folder: Path) -> Path:
    """A workspace in `folder` with the features of a store, and none of the runs of its own workspace."""
    (folder / "features").mkdir()
    (folder / "features" / store.name).symlink_to(store.absolute())
    return folder


def bench_store(store_path: Path, images: int = 300, repeats: int = 5) -> BenchResult:
    """Reading images of a store in random order, copied out, against a raw .npy memory map of the same numbers.

    Raises InputError for a store that is not float16: see `pipelines.bench.int8_reading.bench_int8` for such.
    """
    store = FeatureStore(store_path)
    if store.info.dtype != "float16":
        raise InputError(f"--store {store.key} holds {store.info.dtype}; pass the float16 store that it was made from.")
    generator = np.random.default_rng(0)
    ids = [i for split in store.info.splits for i in store.image_ids(split)]
    ids = [ids[k] for k in generator.permutation(len(ids))[:images]]

    def copies(read: Callable[[int], np.ndarray]) -> Callable[[np.ndarray], None]:
        def way(order: np.ndarray) -> None:
            for k in order:
                np.array(read(k))

        return way

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "raw.npy"
        np.save(file, np.stack([store.read(i) for i in ids]))
        raw = np.load(file, mmap_mode="r")
        orders = [generator.integers(0, len(ids), images) for _ in range(repeats)]
        ours, theirs = in_turn(copies(lambda k: store.read(ids[k])), copies(raw.__getitem__), turns=orders)
    details = {
        "store ms/image": statistics.median(ours) / images * 1e3,
        "raw ms/image": statistics.median(theirs) / images * 1e3,
        "MB/image": raw[0].nbytes / 1e6,
        "images": images,
        "repeats": repeats,
    }
    name = "store: random read against a raw memory map"
    return BenchResult(name, median_ratio(ours, theirs), 3.0, "at most", details)


def bench_featurize(
    coco_dir: Path, backbone: str, weights: Path | None, image_size: int, images: int = 32, repeats: int = 5
) -> BenchResult:
    """Photos to a shard (decode, resize, ViT, float16, Parquet) against the bare ViT on tensors decoded before.

    Both run in this process, with the same batches and threads; loading the model counts for neither.
    """
    vit = {"backbone": backbone, "weights": weights, "image_size": image_size}
    with tempfile.TemporaryDirectory() as folder:
        config = FeaturizeConfig(workspace=Path(folder), coco_dir=coco_dir, **vit)
        splits = find_splits(coco_dir)
        file, photos = splits["train"]
        chosen = list(load_coco(file, photos, "train").images.values())[:images]
        if len(chosen) < images:
            raise InputError(
                f"--images is {images}, but {file} lists {len(chosen)} photos. Pass {len(chosen)} or less."
            )
        shard = Shard(file=Path(folder) / "shard.parquet", split="train", number=0, photos=photos, images=chosen)
        maker = ShardMaker(config, store_settings(config, splits))
        decoded = torch.stack([read_photo(photos / image.file_name, image_size) for image in chosen])
        ready = [maker.backbone.normalise(batch) for batch in decoded.split(config.batch_size)]
        maker.backbone.encode(decoded[: config.batch_size])  # the first call allocates

        def whole(_: int) -> None:
            maker.make(shard)

        def bare(_: int) -> None:
            with torch.inference_mode(), autocast(ready[0].device):
                for batch in ready:
                    features = maker.backbone(batch)
            features.cpu()  # on a GPU the calls above return before their work is done

        ours, theirs = in_turn(whole, bare, turns=range(repeats))
    details = {
        "featurize images/s": images / statistics.median(ours),
        "bare ViT images/s": images / statistics.median(theirs),
        "backbone": f"{backbone} at {image_size} px",
        "threads": torch.get_num_threads(),
        "images": images,
        "repeats": repeats,
    }
    name = "featurize: photos to Parquet against the bare ViT"
    return BenchResult(name, median_ratio(theirs, ours), 0.85, "at least", details)


def bench_episodes(store_path: Path, fold: int = 0, repeats: int = 5, count: int = 2000) -> BenchResult:
    """Episodes drawn a second by this one process: the training mix of (B, N, K), prompts and points included."""
    store = FeatureStore(store_path)
    plan = training_plan(TrainConfig(workspace=store.path.parents[1], fold=fold))
    sizes = [size for size, _, _ in plan.batches]

    def once(_: int) -> None:
        for group, size in enumerate(sizes):
            draw(plan, store, group, 0, round(count * size / sum(sizes)))

    (seconds,) = in_turn(once, turns=range(repeats))
    rate = count / statistics.median(seconds)
    details = {"episodes/s": rate, "episodes": count, "repeats": repeats}
    return BenchResult("episodes: drawn a second on one core, against 2,000", rate / 2000, 1.0, "at least", details)


def bench_data(store_path: Path, fold: int = 0, repeats: int = 5, batches: int = 48) -> BenchResult:
    """Batches of the `paper` recipe, from episodes that are read, against copying the same features out of the store.

    By one thread; the details say how much faster two are.
    """
    store = FeatureStore(store_path)
    plan = training_plan(TrainConfig(workspace=store.path.parents[1], recipe="paper", fold=fold))
    groups = len(plan.batches)
    drawn = [
        draw(plan, store, n % groups, *(plan.batches[n % groups][0] * (n // groups + k) for k in (0, 1)))
        for n in range(batches)
    ]
    builder = BatchBuilder(store, "train")

    def build(episodes: list[Episode]) -> None:
        builder.pack(episodes)
        builder.truth(episodes)

    def copy(episodes: list[Episode]) -> None:
        store.read_batch([e.query for e in episodes])
        store.read_batch([photo for e in episodes for photo in e.supports])

    def by(threads: int, work: Callable[[list[Episode]], None]) -> Callable[[int], None]:
        def way(_: int) -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, drawn))

        return way

    copying, one, two = in_turn(by(1, copy), by(1, build), by(2, build), turns=range(repeats))
    details = {
        "ms/batch": statistics.median(one) / batches * 1e3,
        "copying ms/batch": statistics.median(copying) / batches * 1e3,
        "two threads over one": median_ratio(one, two),
        "repeats": repeats,
    }
    name = "data: a batch against copying its features"
    return BenchResult(name, median_ratio(one, copying), 4.0, "at most", details)


def bench_evaluate(store_path: Path, name: str = "paper", episodes: int = 1000, repeats: int = 1) -> BenchResult:
    """1-way 1-shot evaluation as `evaluate` does it against one episode at a time through the same model.

    `evaluate` computes no episode twice, the loop does. On few photos most of the ratio comes from there, so the
    details say how many episodes are distinct, and about what ratio is left if the loop goes through these alone.
    """
    store = FeatureStore(store_path)
    torch.manual_seed(0)
    model = build(preset(name, channels=store.info.channels)).eval()
    device = torch.device("cpu")

    def shards(count: int) -> EpisodeShards:
        config = EvaluateConfig(workspace=store_path.parents[1], episodes=count)
        return ensure_episodes(evaluation_plan(config, 0), store)

    def ours(drawn: EpisodeShards) -> None:
        builder = BatchBuilder(store, "val", model.config.mask_px)
        score(predictor(model, builder, device), drawn, builder, device)

    @torch.inference_mode()
    def one_by_one(drawn: EpisodeShards) -> None:
        builder = BatchBuilder(store, "val", model.config.mask_px)
        scores = FewShotIoU()
        for episode in drawn:
            truth = builder.full_truth(episode)
            scores.add(segment(model(builder.pack([episode]).to(device))[0], truth.shape), truth, episode.classes)

    drawn = shards(episodes)
    distinct = len(set(tasks_of(drawn)))
    batched, single = in_turn(ours, one_by_one, turns=[drawn] * repeats, warm_up=shards(16))
    ratio = median_ratio(single, batched)
    details = {
        "episodes": episodes,
        "distinct": distinct,
        "ratio on distinct": ratio * distinct / episodes,
        "episodes/s": episodes / statistics.median(batched),
        "one at a time/s": episodes / statistics.median(single),
    }
    return BenchResult("evaluate: episodes a second over one episode at a time", ratio, 3.0, "at least", details)


def median_ratio(over: list[float], under: list[float]) -> float:
    """The median over the turns of the ratio of two ways."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def in_turn(*ways: Callable, turns: Sequence, warm_up: object = None) -> tuple[list[float], ...]:
    """Seconds of each call of each way: forwards, backwards, forwards, ... after one untimed turn of all.

    The untimed turn is `warm_up`, or else the first.
    """
    seconds: dict[Callable, list[float]] = {way: [] for way in ways}
    for way in ways:
        way(turns[0] if warm_up is None else warm_up)
    for number, turn in enumerate(turns):
        for way in ways if number % 2 == 0 else reversed(ways):
            started = time.perf_counter()
            way(turn)
            seconds[way].append(time.perf_counter() - started)
    return tuple(seconds.values())
