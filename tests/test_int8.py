"""Features in eight bits: half the bytes, close to those they come from, and made in one way."""

import numpy as np
import pytest
import torch

from la.backbone.quantised import Quantised, quantise
from la.data.coco import Image
from la.episodes.batch import EpisodeBatch
from la.errors import InputError
from pipelines.config import EvaluateConfig, FeaturizeConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import draw, evaluation_plan
from pipelines.evaluation.evaluate import evaluate
from pipelines.store.convert import convert
from pipelines.store.feature_shards import ShardNote, write_shard
from pipelines.store.featurize import featurize
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace
from tests.conftest import TINY


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_weights) -> tuple[FeatureStore, FeatureStore]:
    """One store of drawn scenes, float16, and the int8 store converted from it."""
    root = tmp_path_factory.mktemp("ws")
    scenes = draw_scenes(root / "scenes", train_images=24, val_images=60)
    made = featurize(FeaturizeConfig(workspace=root, coco_dir=scenes, weights=tiny_weights, threads=1, **TINY))
    return FeatureStore(made.store), FeatureStore(convert(root).store)


def decoded(features: np.ndarray) -> torch.Tensor:
    values, scales = quantise(features)
    return Quantised(torch.from_numpy(values), torch.from_numpy(scales)).to("cpu")


def test_a_number_is_off_by_half_a_step_of_its_token_at_most():
    features = np.random.default_rng(0).normal(size=(3, 4, 5, 64)) * np.logspace(-4, 4, 5)[:, None]
    features = features.astype(np.float16).astype(np.float32)
    steps = np.abs(features).max(-1, keepdims=True) / 127
    error = np.abs(decoded(features).numpy() - features)
    # float16 rounds the scale itself, by 2^-11 of it at most, or by 2^-25 where it is below the normal numbers
    assert (error <= 0.5 * steps * 1.001 + 127 * (steps * 2**-11 + 2**-25)).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 6e-8, 65504.0, -65504.0])
def test_the_ends_of_float16_stay_finite_and_keep_their_sign(value):
    features = np.full((1, 1, 1, 4), value, np.float16)
    found = decoded(features)
    assert found.isfinite().all()
    torch.testing.assert_close(found, torch.from_numpy(features).float(), rtol=1e-3, atol=1e-6)


def test_a_shard_of_int8_takes_at_most_52_percent_of_the_bytes(stores, tmp_path):
    settings = stores[0].info.settings
    note = ShardNote(key="", split="val", number=0, image_ids=[1], skipped={}, weights_digest="", patch_size=14,
                     channels=384, grid=(30, 30))  # fmt: skip
    photo = Image(1, "1.jpg", 420, 420), np.random.default_rng(0).normal(size=(30, 30, 384)).astype(np.float16)
    sizes = {}
    for dtype in ("float16", "int8"):
        write_shard(tmp_path / dtype, settings.model_copy(update={"dtype": dtype}), note, [photo])
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    assert sizes["int8"] <= 0.52 * sizes["float16"]


def test_a_converted_store_gives_what_was_quantised(stores):
    plain, small = stores
    assert small.info.dtype == "int8"
    assert small.key != plain.key
    assert small.dataset("val") == plain.dataset("val")
    ids = plain.image_ids("val")[::7]
    expected = decoded(np.stack([plain.read(i) for i in ids]))
    assert torch.equal(small.read_batch(ids), expected)
    assert np.array_equal(small.read(ids[2]), expected[2])
    assert small.read_batch([]).shape == (0, *plain.info.grid, plain.info.channels)
    assert list(small.verify()) == sorted(small.info.shards)


def test_featurizing_in_int8_and_converting_give_the_same_bytes(stores, tmp_path, tiny_weights):
    plain, small = stores
    config = FeaturizeConfig(
        workspace=tmp_path, coco_dir=plain.info.coco_dir, weights=tiny_weights, threads=1, dtype="int8", **TINY
    )
    made = FeatureStore(featurize(config).store)
    assert made.key == small.key
    assert made.info.shards == small.info.shards


def test_a_batch_is_decoded_where_it_is_moved_to(stores):
    def packed(store: FeatureStore) -> EpisodeBatch:
        plan = evaluation_plan(EvaluateConfig(workspace=store.path.parents[1], episodes=2, ways=2), 0)
        return BatchBuilder(store, "val").pack(draw(plan, store, 0, 0, 2))

    plain, small = map(packed, stores)
    assert isinstance(small.query, Quantised)
    moved = small.to("cpu")
    for name in ("query", "support"):
        before, after = getattr(plain, name).float(), getattr(moved, name)
        assert (before - after).norm() < 0.02 * before.norm()
    assert torch.equal(plain.pairs.slot, moved.pairs.slot)


def test_the_same_episodes_score_the_same_but_for_rounding(stores):
    plain, small = (
        evaluate(EvaluateConfig(workspace=s.path.parents[1], store=s.key, method="prototype", seeds=1, episodes=40))
        for s in stores
    )
    assert plain.episodes_digest == small.episodes_digest
    assert plain.miou == pytest.approx(small.miou, abs=0.3)


def test_conversion_goes_on_where_it_was_stopped(stores):
    _, small = stores
    files = sorted(small.info.shards)
    before = {file: (small.path / file).stat().st_mtime_ns for file in files}
    content = (small.path / "store.json").read_text()
    (small.path / "store.json").unlink()
    (small.path / files[0]).unlink()
    seen = []
    report = convert(small.path.parents[1], on_shard=lambda done, total: seen.append((done, total)))
    assert (report.made, report.already) == (1, len(files) - 1)
    assert seen[-1] == (len(files), len(files))
    assert (report.store / "store.json").read_text() == content
    assert all((small.path / file).stat().st_mtime_ns == before[file] for file in files[1:])
    again = convert(small.path.parents[1])  # the store to convert is still the float16 one
    assert (again.made, again.already) == (0, len(files))


def test_what_cannot_be_converted_is_told(stores):
    root = stores[0].path.parents[1]
    with pytest.raises(InputError, match="holds int8; only float16 is converted"):
        convert(root, stores[1].key)
    with pytest.raises(InputError, match="--dtype float16"):
        convert(root, stores[0].key, "float16")
    with pytest.raises(InputError, match="several stores"):
        Workspace(root).find_store()


def test_damage_is_not_carried_over(stores, tmp_path):
    plain, _ = stores
    copy = tmp_path / "features" / plain.key
    for file in plain.path.rglob("*.*"):
        (copy / file.relative_to(plain.path)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(plain.path)).write_bytes(file.read_bytes())
    shard = copy / "val/part-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[content.index(plain.read(plain.image_ids("val")[0]).tobytes()) + 5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"val/part-00000.parquet is missing, damaged.*checksum"):
        convert(tmp_path)
    assert not list((tmp_path / "features").glob("*/val/part-00000.parquet"))[1:]


def test_what_was_trained_on_either_runs_on_both(stores):
    plain, small = stores
    assert {plain.key, small.key} == plain.info.settings.keys_alike == small.info.settings.keys_alike
