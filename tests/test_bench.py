"""What a comparison says of itself."""

import numpy as np
import pytest

from la.errors import InputError
from pipelines.bench.int8_reading import bench_int8, int8_beside
from pipelines.bench.model_speed import bench_model
from pipelines.bench.random_store import made_up_dataset, made_up_features
from pipelines.bench.ratios import BenchResult, bench_data, bench_evaluate, bench_featurize, bench_store
from pipelines.bench.step_operators import step_operators
from pipelines.config import FeaturizeConfig, TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.store.convert import convert
from pipelines.store.featurize import featurize
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("ratio", "sense", "passed"),
    [(0.9, "at least", True), (0.8, "at least", False), (0.8, "at most", True), (0.9, "at most", False)],
)
def test_a_ratio_passes_on_its_side_of_the_bar(ratio, sense, passed):
    result = BenchResult("x", ratio, 0.85, sense)
    assert result.passed == passed
    assert ("passed" if passed else "FAILED") in str(result)


def test_more_photos_than_there_are_is_refused(tiny_coco, tiny_weights):
    with pytest.raises(InputError, match="--images is 99, but"):
        bench_featurize(tiny_coco, TINY["backbone"], tiny_weights, TINY["image_size"], images=99)


def test_a_store_is_read_against_raw_numbers_and_against_its_int8(tmp_path):
    photos = {"train": made_up_dataset("train", 1, np.ones((12, 1), int))}
    values = np.ones((4, 4, 64), np.float16)
    store = made_up_features(tmp_path, photos, lambda image: values * image.id, patch_size=8)
    assert int8_beside(store) is None
    convert(tmp_path)
    read = bench_store(store, images=10, repeats=2)
    assert read.ratio > 0
    assert read.details["MB/image"] == 4 * 4 * 64 * 2 / 1e6
    size, speed = bench_int8(store, int8_beside(store), images=10, repeats=2)
    assert 0.5 < size.ratio < 1
    assert all(value > 0 for value in speed.details.values())
    with pytest.raises(InputError, match="holds int8"):
        bench_store(int8_beside(store))


def test_the_model_is_measured_packed_and_dense(tmp_path, tiny_weights):
    scenes = draw_scenes(tmp_path / "scenes", train_images=200, val_images=60)
    store = featurize(FeaturizeConfig(workspace=tmp_path, coco_dir=scenes, weights=tiny_weights, **TINY)).store
    results = bench_model(store, "debug", repeats=1)
    training, memory, evaluation, shots, query = results
    assert training.details["pairs dense"] == 2 * (4 * 2) * (
        4 + 1
    )  # B episodes, N*K supports, N classes and background
    assert training.details["pairs packed"] < training.details["pairs dense"]
    assert evaluation.details["pairs dense"] == (5 * 5) * (5 + 1)
    assert memory.passed  # bytes are the same on every run, unlike seconds
    assert shots.passed
    assert shots.details["chunked differs by"] < 1e-5
    assert query.ratio > 0
    assert bench_data(store, repeats=1, batches=6).details["two threads over one"] > 0
    evaluated = bench_evaluate(store, "debug", episodes=12)
    assert evaluated.details["episodes"] == 12
    assert 1 <= evaluated.details["distinct"] <= 12
    assert evaluated.ratio > 0
    sizes = TrainConfig(workspace=tmp_path, preset="debug", batches=((2, 1, 1), (1, 2, 1)))
    dispatched, computing = step_operators(sizes)
    assert 300 < computing < dispatched < 1400
    assert step_operators(sizes) == (dispatched, computing)
