"""What the measurement of very many images makes, at a small size."""

from la.data.coco import decode
from pipelines.store.reader import FeatureStore
from tools.scale_check import OBJECTS, bench_scale, large_store, training_episodes


def test_a_made_up_store_is_a_real_one(tmp_path):
    store = FeatureStore(large_store(tmp_path, 400))
    assert [len(store.image_ids(split)) for split in ("train", "val")] == [360, 40]
    assert list(store.verify()) == sorted(store.info.shards)
    assert store.read(400).shape == (2, 2, 2)
    dataset = store.dataset("val")
    assert list(dataset.annotations) == sorted(dataset.images)
    found = dataset.annotations[361]
    assert (len(found), {one.image_id for one in found}) == (OBJECTS, {361})
    image = dataset.images[361]
    assert all(decode([one], image.height, image.width).sum() == one.area for one in found)
    shards = training_episodes(store.path, 90)
    assert sum(1 for _ in shards) == shards.manifest["episodes"] >= 90


def test_it_is_measured_and_nothing_is_left(tmp_path):
    results = {result.name: result for result in bench_scale(1000, 300, tmp_path)}
    assert len(results) == 4
    assert results["scale: MB to open the store"].ratio > 0
    assert results["scale: minutes to draw and write the episodes"].details["episodes"] >= 300
    assert results["scale: MB that reading grows by after a tenth"].details["episodes/s"] > 0
    assert not list(tmp_path.iterdir())
