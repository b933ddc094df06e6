"""Features in eight bits against sixteen: bytes, and reading."""

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines.bench.ratios import BenchResult, in_turn, median_ratio
from pipelines.store.reader import FeatureStore, read_info

READ_AT_ONCE = 8  # images of a batch


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

    def whole(read: Callable[[list[int]], object]) -> Callable[[list[int]], None]:
        def way(order: list[int]) -> None:
            for start in range(0, images, READ_AT_ONCE):
                read(order[start : start + READ_AT_ONCE])

        return way

    decoded = (whole(small.read_batch), whole(lambda batch: plain.read_batch(batch).float()))
    seconds = in_turn(whole(small.read_encoded), whole(plain.read_encoded), *decoded, turns=orders)
    sizes = [sum(f.stat().st_size for f in path.glob("*/part-*.parquet")) for path in (small_path, plain_path)]
    details = {"int8 MB": sizes[0] / 1e6, "float16 MB": sizes[1] / 1e6}
    names = ("int8 ms/image", "float16 ms/image", "decoded on the CPU", "float16 to float32")
    read = {name: statistics.median(way) / images * 1e3 for name, way in zip(names, seconds, strict=True)}
    return [
        BenchResult("int8: bytes of the store against float16", sizes[0] / sizes[1], 0.52, "at most", details),
        BenchResult("int8: random read against float16", median_ratio(*seconds[:2]), 1.0, "at most", read),
    ]
