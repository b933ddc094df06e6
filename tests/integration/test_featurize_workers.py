"""Featurizing with Ray Data actors."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from la.errors import InputError
from pipelines.cluster import ray_session
from pipelines.config import FeaturizeConfig
from pipelines.store.featurize import featurize
from pipelines.store.featurize_on_ray import ShardShare, make_with_ray, share_of
from pipelines.store.reader import FeatureStore
from tests.conftest import TINY


@pytest.fixture
def config(tiny_coco, tiny_weights, tmp_path):
    return FeaturizeConfig(
        workspace=tmp_path / "here", coco_dir=tiny_coco, weights=tiny_weights, shard_size=5, threads=1, **TINY
    )


@pytest.mark.timeout(300)
def test_workers_make_the_same_store_and_report_the_same_mistakes(config, tiny_coco, tmp_path):
    alone = FeatureStore(featurize(config).store)
    with ray_session():
        apart = config.model_copy(update={"workspace": tmp_path / "apart", "workers": 2})
        report = featurize(apart)
        assert (report.made, report.already) == (26, 0)
        assert report.images_per_second > 0
        assert FeatureStore(report.store).info.shards == alone.info.shards

        (report.store / "store.json").unlink()
        (report.store / "train/part-00001.parquet").unlink()
        photo = tiny_coco / "train2017/000000000107.jpg"
        photo.write_bytes(photo.read_bytes()[:400])
        with pytest.raises(InputError, match=f"{photo}.*skip_bad"):
            featurize(apart)
        assert not list(report.store.rglob("*.tmp"))
        skipping = featurize(apart.model_copy(update={"skip_bad": True}))
        assert (skipping.made, skipping.already) == (4, 21)
        assert list(skipping.skipped) == ["000000000107.jpg"]

        alone_in_its_batch = {"batch_size": 1, "skip_bad": True}
        here = featurize(config.model_copy(update=alone_in_its_batch | {"workspace": tmp_path / "one-here"}))
        there = featurize(apart.model_copy(update=alone_in_its_batch | {"workspace": tmp_path / "one-apart"}))
        assert FeatureStore(here.store).info.shards == FeatureStore(there.store).info.shards


def test_a_shard_is_told_once_and_one_that_is_repaired_is_made(monkeypatch, tmp_path):
    """Ray may run a task again; a writer may die before it wrote a shard whose old file is still there."""
    good, bad = (SimpleNamespace(file=tmp_path / name) for name in ("good", "bad"))
    bad.file.touch()
    passes = iter([[(0, "note of good"), (0, "note of good")], [(1, "note of bad")]])
    monkeypatch.setattr("pipelines.store.featurize_on_ray._one_pass", lambda *_: iter(next(passes)))
    monkeypatch.setattr("pipelines.store.featurize_on_ray.ray_session", nullcontext)
    made = list(make_with_ray(SimpleNamespace(device="cpu"), None, [good, bad], lambda *_: None))
    assert made == [(good, "note of good"), (bad, "note of bad")]


@pytest.mark.parametrize(
    ("settings", "actors", "nodes", "share"),
    [
        ({"threads": 1}, 1, [{"CPU": 1}], ShardShare(0.5, 1, 0.5, 0)),
        ({"threads": 1}, 2, [{"CPU": 2}], ShardShare(1, 2, 0.5, 0)),
        ({"threads": 32}, 2, [{"CPU": 8}] * 4, ShardShare(1, 32, 8, 0)),
        ({"threads": 8}, 8, [{"CPU": 64, "GPU": 8}], ShardShare(1, 64, 1, 1)),
        ({"threads": 8}, 3, [{"CPU": 16, "GPU": 2}], ShardShare(1, 16, 1, 0.5)),
        ({"threads": 4, "device": "cpu"}, 2, [{"CPU": 16, "GPU": 2}], ShardShare(1, 16, 4, 0)),
    ],
)
def test_no_stage_asks_for_more_than_the_nodes_have(config, settings, actors, nodes, share):
    assert share_of(config.model_copy(update=settings), actors, nodes) == share
