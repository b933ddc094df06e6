"""What size costs: features in eight bits against sixteen, and a store and episodes of very many images."""

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

from la.data.coco import Annotation, Dataset, Image
from pipelines.bench.random_store import ellipse, made_up_features
from pipelines.bench.ratios import BenchResult, in_turn
from pipelines.config import TrainConfig
from pipelines.episodes.episode_shards import EpisodeShards, ensure_episodes, training_plan
from pipelines.store.reader import FeatureStore, read_info

READ_AT_ONCE = 8  # images of a batch
OBJECTS = 7  # on each image of a made-up store, about as many as in COCO
SIDE = 480  # pixels of its photos


def int8_beside(store_path: Path) -> Path | None:
    """The int8 store of the same features, where the workspace holds one."""
    path = store_path.parent / read_info(store_path).settings.model_copy(update={"dtype": "int8"}).key
    return path if (path / "store.json").exists() else None


def bench_int8(plain_path: Path, small_path: Path, images: int = 300, repeats: int = 5) -> list[BenchResult]:
    """Bytes, and reading in random order what a device decodes, int8 against float16.

    The details also give both read into the float32 that a model on a CPU works with: int8 decoded, float16 widened.
    """
    plain, small = FeatureStore(plain_path), FeatureStore(small_path)
    generator = np.random.default_rng(0)
    ids = [i for split in plain.info.splits for i in plain.image_ids(split)]
    orders = [[ids[k] for k in generator.integers(0, len(ids), images)] for _ in range(repeats)]

    def batches(order: list[int]) -> list[list[int]]:
        return [order[k : k + READ_AT_ONCE] for k in range(0, images, READ_AT_ONCE)]

    def from_small(order: list[int]) -> None:
        for batch in batches(order):
            small.read_batch(batch)

    def from_plain(order: list[int]) -> None:
        for batch in batches(order):
            plain.read_batch(batch).float()

    def small_to_device(order: list[int]) -> None:
        for batch in batches(order):
            small.read_encoded(batch)

    def plain_to_device(order: list[int]) -> None:
        for batch in batches(order):
            plain.read_encoded(batch)

    ours, theirs, ours_raw, theirs_raw = in_turn(from_small, from_plain, small_to_device, plain_to_device, turns=orders)

    def ms(seconds: list[float]) -> float:
        return statistics.median(seconds) / images * 1e3

    sizes = [sum(f.stat().st_size for f in path.glob("*/part-*.parquet")) for path in (small_path, plain_path)]
    details = {"int8 MB": sizes[0] / 1e6, "float16 MB": sizes[1] / 1e6}
    read = {"int8 ms/image": ms(ours_raw), "float16 ms/image": ms(theirs_raw)}
    read |= {"decoded on the CPU": ms(ours), "float16 to float32": ms(theirs)}
    raw_ratio = statistics.median(a / b for a, b in zip(ours_raw, theirs_raw, strict=True))
    return [
        BenchResult("int8: bytes of the store against float16", sizes[0] / sizes[1], 0.52, "at most", details),
        BenchResult("int8: random read against float16", raw_ratio, 1.0, "at most", read),
    ]


def large_store(root: Path, images: int) -> Path:
    """A store of so many images as COCO has them, 7 objects of 80 classes on each, with features of 8 numbers.

    A tenth of the images are the val split. Objects take their masks from a thousand drawn once.
    """
    generator = np.random.default_rng(0)
    counts = {"train": images - images // 10, "val": images // 10}
    masks = [_mask(generator) for _ in range(1000)]
    datasets, first = {}, 1
    for split, count in counts.items():
        datasets[split] = _dataset(split, range(first, first + count), masks, generator)
        first += count
    return made_up_features(root, datasets, lambda _: generator.normal(size=(2, 2, 2)).astype(np.float16), patch_size=8)


def _mask(generator: np.random.Generator) -> tuple[int, tuple[float, float, float, float], bytes]:
    """(area, box, run lengths) of an ellipse, on a photo of SIDE pixels a side."""
    outline = ellipse(generator, (SIDE / 40, SIDE / 4), SIDE, SIDE)
    (rle,) = rle_tools.frPyObjects([outline.ravel().tolist()], SIDE, SIDE)
    x, y, w, h = (float(v) for v in rle_tools.toBbox(rle))
    return int(rle_tools.area(rle)), (x, y, x + w, y + h), rle["counts"]


def _dataset(split: str, ids: range, masks: list, generator: np.random.Generator) -> Dataset:
    images = {i: Image(i, f"{i:012d}.jpg", SIDE, SIDE) for i in ids}
    classes = generator.integers(1, 81, (len(ids), OBJECTS)).tolist()
    chosen = generator.integers(0, len(masks), (len(ids), OBJECTS)).tolist()
    annotations = {
        i: tuple(
            Annotation(OBJECTS * i + n, i, c, False, *masks[m]) for n, (c, m) in enumerate(zip(cs, ms, strict=True))
        )
        for i, cs, ms in zip(ids, classes, chosen, strict=True)
    }
    return Dataset(split, images, {c: f"class {c}" for c in range(1, 81)}, annotations)


def opening(path: Path) -> dict[str, float]:
    """What opening a store takes of a process that has done nothing else."""
    before, started, worked = _resident(), time.perf_counter(), time.process_time()
    store = FeatureStore(path)
    count = len(store.index)
    waited, seconds = time.perf_counter() - started, time.process_time() - worked
    for image_id in range(1, count + 1, max(1, count // 100)):
        store.read(image_id)
    opened, worked = _resident() - before, time.process_time()
    datasets = [store.dataset(split) for split in store.info.splits]  # kept, as they count
    figures = {"index s": seconds, "by the clock": waited, "opened MB": opened / 1e6}
    figures |= {"annotations s": time.process_time() - worked, "with annotations MB": (_resident() - before) / 1e6}
    del datasets
    return figures


def reading(path: Path, episodes: int) -> dict[str, float]:
    """What reading all episodes once takes of a process."""
    shards, started = training_episodes(path, episodes), time.perf_counter()
    tenth = max(1, shards.manifest["episodes"] // 10)
    seen, count = [], 0
    for count, _ in enumerate(shards, start=1):
        if count % tenth == 0:
            seen.append(_resident())
    rate = count / (time.perf_counter() - started)
    return {"read": count, "episodes/s": rate, "grown MB": (max(seen) - seen[0]) / 1e6}


def _resident() -> int:
    """Bytes now: loading annotations takes more for a moment, which would hide growth from a peak."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def bench_scale(images: int, episodes: int, folder: Path | None = None) -> Iterator[BenchResult]:
    """A made-up store and its training episodes: opened, drawn, written, streamed, each against its bar.

    The bars are of 100,000 images and 1,000,000 episodes. What is made lies in `folder`, or in one that is removed
    at the end. What is read is read by a process of its own, so that nothing counts but what it needs. Seconds are
    those of the processor: one core that does nothing else; the details say how long it was by the clock.
    """
    with tempfile.TemporaryDirectory(dir=folder) as root:
        path = large_store(Path(root), images)
        opened = _in_a_process(opening, path)
        details = {"images": images, "by the clock": opened["by the clock"]}
        yield BenchResult("scale: seconds to load the index", opened["index s"], 2.0, "at most", details)
        details = {
            name: opened[name] for name in ("annotations s", "with annotations MB")
        }  # once something asks for them
        yield BenchResult("scale: MB to open the store", opened["opened MB"], 200.0, "at most", details)

        started, worked = time.perf_counter(), time.process_time()
        shards = training_episodes(path, episodes)
        minutes = (time.process_time() - worked) / 60
        count = shards.manifest["episodes"]
        details = {"episodes": count, "episodes/s": count / (60 * minutes)}
        details |= {"minutes by the clock": (time.perf_counter() - started) / 60}
        name = "scale: minutes to draw and write the episodes"
        yield BenchResult(name, minutes, 10.0 * episodes / 1e6, "at most", details)

        read = _in_a_process(reading, path, episodes)
        if read["read"] != count:
            raise AssertionError(f"{count} episodes were written, {read['read']} read")
        details = {"episodes/s": read["episodes/s"], "episodes": count}
        yield BenchResult("scale: MB that reading grows by after a tenth", read["grown MB"], 50.0, "at most", details)


def training_episodes(store: Path, count: int) -> EpisodeShards:
    """About so many training episodes of a store, the mix of (B, N, K) of the paper, drawn where they are not there."""
    config = TrainConfig(workspace=Path(store).parents[1], fold=0)
    per_batch = sum(size for size, _, _ in config.batches) / len(config.batches)
    plan = training_plan(config.model_copy(update={"train_batches": round(count / per_batch)}))
    return ensure_episodes(plan, FeatureStore(store))


def _in_a_process(measure: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(measure, *arguments).result()
