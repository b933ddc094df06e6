"""A made-up store of very many images and its episodes: seconds and memory against their bars.

`python -m tools.scale_check` takes a hundred thousand images and a million episodes. Exit code 1 where a bar is missed.
"""

import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from commands.options import mistakes, say
from pipelines.bench.random_store import CLASSES, made_up_dataset, made_up_features
from pipelines.bench.ratios import BenchResult
from pipelines.config import TrainConfig
from pipelines.episodes.episode_shards import EpisodeShards, ensure_episodes, training_plan
from pipelines.store.reader import FeatureStore

OBJECTS = 7  # on each image of a made-up store, about as many as in COCO


def large_store(root: Path, images: int) -> Path:
    """A store of so many images as COCO has them, 7 objects of 80 classes on each, with features of 8 numbers.

    A tenth of the images are the val split.
    """
    generator = np.random.default_rng(0)
    datasets, first = {}, 1
    for split, count in {"train": images - images // 10, "val": images // 10}.items():
        datasets[split] = made_up_dataset(split, first, generator.integers(1, CLASSES + 1, (count, OBJECTS)))
        first += count
    return made_up_features(root, datasets, lambda _: generator.normal(size=(2, 2, 2)).astype(np.float16), patch_size=8)


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


def run(
    images: Annotated[int, typer.Option(min=1000, help="Of the made-up store.")] = 100_000,
    count: Annotated[int, typer.Option("--episodes", min=1000, help="Drawn, written and read.")] = 1_000_000,
) -> None:
    with mistakes():
        passed = True
        for result in bench_scale(images, count):
            say(str(result))
            passed &= result.passed
        if not passed:
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(run)
