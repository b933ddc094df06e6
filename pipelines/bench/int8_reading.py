"""Features in eight bits against sixteen: bytes, and reading."""

import statistics
from pathlib import Path

import numpy as np

from pipelines.bench.ratios import BenchResult, in_turn
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
