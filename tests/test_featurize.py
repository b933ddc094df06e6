"""Featurizing a folder: what is made, what is kept, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines.store.featurize
from la.backbone.vit import load_backbone
from la.data.photos import read_photo
from la.errors import InputError
from pipelines.config import FeaturizeConfig
from pipelines.store.featurize import featurize, plan_shards
from pipelines.store.reader import FeatureStore
from pipelines.workspace import locked
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tiny_coco: Path, tiny_weights: Path, tmp_path: Path) -> FeaturizeConfig:
    return FeaturizeConfig(
        workspace=tmp_path / "ws",
        coco_dir=tiny_coco,
        weights=tiny_weights,
        batch_size=3,
        shard_size=5,
        threads=1,
        **TINY,
    )


def changed(config: FeaturizeConfig, **changes) -> FeaturizeConfig:
    return config.model_copy(update=changes)


def truncate(coco: Path, name: str = "train2017/000000000107.jpg") -> Path:
    photo = coco / name
    photo.write_bytes(photo.read_bytes()[:400])
    return photo


def test_features_are_those_of_the_backbone(config):
    store = FeatureStore(featurize(config).store)
    backbone = load_backbone(config.backbone, config.image_size, config.weights)
    for image_id, name in ((100, "train2017/000000000100.jpg"), (205, "val2017/000000000205.jpg")):
        photo = read_photo(config.coco_dir / name, config.image_size)
        alone = backbone.encode(photo[None])[0].numpy()
        np.testing.assert_allclose(store.read(image_id), alone, atol=4e-3)  # another batch, other rounding


def test_done_twice_there_is_nothing_to_do_and_no_model_is_loaded(config, monkeypatch):
    first = featurize(config)
    monkeypatch.setattr("pipelines.store.shard_maker.load_backbone", lambda *a: pytest.fail("the model was loaded"))
    monkeypatch.setattr(pipelines.store.featurize, "load_coco", lambda *a: pytest.fail("annotations were read"))
    again = featurize(config)
    assert (first.made, first.already) == (26, 0)
    assert (again.made, again.already, again.store) == (0, 26, first.store)


def test_what_does_not_change_features_does_not_change_the_store(config, tmp_path):
    one = featurize(config)
    other = featurize(changed(config, batch_size=26, shard_size=None, threads=None))
    assert other.store == one.store
    assert other.made == 0


def test_another_size_is_another_store(config):
    assert featurize(config).store != featurize(changed(config, image_size=32)).store


def test_a_killed_run_goes_on_where_it_was(config, tmp_path):
    whole = featurize(changed(config, workspace=tmp_path / "whole"))
    script = (
        "import sys, time\n"
        "import pipelines.store.shard_maker as m\n"
        "from pipelines.store.featurize import FeaturizeConfig, featurize\n"
        "read = m.read_photo\n"
        "m.read_photo = lambda *a: (time.sleep(0.05), read(*a))[1]\n"
        "featurize(FeaturizeConfig.model_validate_json(sys.argv[1]))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script, config.model_dump_json()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while len(list(config.workspace.glob("features/*/train/part-*.parquet"))) < 2 and time.monotonic() < until:
            assert run.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    kept = {p: p.stat().st_mtime_ns for p in config.workspace.glob("features/*/*/part-*.parquet")}
    assert not list(config.workspace.glob("features/*/store.json"))
    report = featurize(config)
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in report.store.glob("*/part-*.parquet")}.items()
    assert report.already >= 10
    assert report.made + report.already == 26
    assert FeatureStore(report.store).info.shards == FeatureStore(whole.store).info.shards
    assert not list(report.store.rglob("*.tmp"))


def test_a_bad_photo_stops_the_run_and_is_named(config):
    photo = truncate(config.coco_dir)
    with pytest.raises(InputError, match=f"{photo}.*skip_bad"):
        featurize(config)


def test_a_bad_photo_is_skipped_on_demand_and_told(config):
    truncate(config.coco_dir)
    report = featurize(changed(config, skip_bad=True))
    store = FeatureStore(report.store)
    assert report.made == 25
    assert list(report.skipped) == ["000000000107.jpg"]
    assert store.info.splits["train"].skipped == report.skipped
    assert 107 not in store.image_ids("train")
    assert 107 not in store.dataset("train").annotations
    with pytest.raises(InputError, match="image 107 is not in the store"):
        store.read(107)
    assert np.array_equal(store.read(108), FeatureStore(report.store).read_batch([108])[0])
    assert list(store.verify()) == sorted(store.info.shards)


def test_shards_that_leave_photos_out_are_not_taken_up_unasked(config):
    truncate(config.coco_dir)
    report = featurize(changed(config, skip_bad=True))
    (report.store / "store.json").unlink()
    with pytest.raises(InputError, match="skip_bad"):
        featurize(config)


def test_a_photo_of_another_size_than_annotated_is_refused(config):
    file = config.coco_dir / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["images"][4] |= {"height": 64, "width": 48}  # the one without annotations
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"000000000204.jpg is 64x48 pixels, but the annotations say 48x64"):
        featurize(config)


def test_a_split_that_is_not_there_is_named(config):
    with pytest.raises(InputError, match=r"no train split.*instances_train2014.*train_split"):
        featurize(changed(config, train_split="train2014"))


def test_splits_must_not_share_image_ids(config):
    for split, offset in (("train2017", 0), ("val2017", 100)):
        file = config.coco_dir / f"annotations/instances_{split}.json"
        content = json.loads(file.read_text())
        for image in content["images"]:
            image["id"] -= offset
        for one in content["annotations"]:
            one["image_id"] -= offset
        file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="share 6 image ids"):
        featurize(config)


def test_shards_of_another_shard_size_are_not_mixed_in(config):
    report = featurize(config)
    (report.store / "store.json").unlink()
    with pytest.raises(InputError, match="another shard_size"):
        featurize(changed(config, shard_size=7))


def test_a_second_run_is_refused_and_leaves_the_first_its_files(config, monkeypatch):
    make = pipelines.store.featurize.make_shards

    def meanwhile(*arguments):
        monkeypatch.setattr(pipelines.store.featurize, "make_shards", make)
        with pytest.raises(InputError, match=r"is in use: .* is already running"):
            featurize(config)
        yield from make(*arguments)

    monkeypatch.setattr(pipelines.store.featurize, "make_shards", meanwhile)
    report = featurize(config)
    assert (report.made, report.already) == (26, 0)
    with locked(report.store, wait=False):
        assert featurize(config).already == 26, "a finished store is only read"


def test_a_shard_of_another_store_is_refused(config):
    one, other = featurize(config).store, featurize(changed(config, image_size=32)).store
    (one / "store.json").unlink()
    (other / "train/part-00001.parquet").rename(one / "train/part-00001.parquet")
    with pytest.raises(InputError, match=r"part-00001.parquet was made with other settings"):
        featurize(config)


def test_weights_that_changed_under_their_name_are_refused(config, monkeypatch):
    report = featurize(config)
    (report.store / "store.json").unlink()
    (report.store / "val/part-00000.parquet").unlink()
    load = pipelines.store.shard_maker.load_backbone

    def another(*arguments):
        backbone = load(*arguments)
        backbone.weights_digest = "0" * 64
        return backbone

    monkeypatch.setattr("pipelines.store.shard_maker.load_backbone", another)
    with pytest.raises(InputError, match="made with other weights"):
        featurize(config)


def test_features_beyond_float16_are_refused(config, monkeypatch):
    monkeypatch.setattr(
        "la.backbone.vit.Backbone.encode", lambda self, photos: torch.full((len(photos), 8, 8, 128), torch.inf)
    )
    with pytest.raises(InputError, match="float16 cannot hold"):
        featurize(config)


@pytest.mark.parametrize(("photos", "size"), [(20, 16), (6400, 100), (118_287, 1000)])
def test_a_kill_loses_little_whatever_the_size(photos, size, tmp_path):
    from la.data.coco import Dataset, Image

    images = {i: Image(i, f"{i}.jpg", 1, 1) for i in range(photos)}
    shards = plan_shards(tmp_path, {"train": Dataset("train", images, {}, {})}, {"train": tmp_path}, None)
    assert len(shards[0].images) == size
    assert [i.id for shard in shards for i in shard.images] == list(images)
