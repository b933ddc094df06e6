"""Featurizing with Ray Data actors."""

import pytest

from la.errors import InputError
from pipelines.cluster import ray_session
from pipelines.config import FeaturizeConfig
from pipelines.featurize import featurize
from pipelines.store import FeatureStore
from tests.conftest import TINY


@pytest.mark.timeout(180)
def test_workers_make_the_same_store_and_report_the_same_mistakes(tiny_coco, tiny_weights, tmp_path):
    config = FeaturizeConfig(
        workspace=tmp_path / "here", coco_dir=tiny_coco, weights=tiny_weights, shard_size=5, threads=1, **TINY
    )
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
        with pytest.raises(InputError, match=f"{photo}.*--skip-bad"):
            featurize(apart)
        skipping = featurize(apart.model_copy(update={"skip_bad": True}))
        assert (skipping.made, skipping.already) == (4, 21)
        assert list(skipping.skipped) == ["000000000107.jpg"]
