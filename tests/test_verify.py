"""Verifying a store: every kind of damage is found and named, and a repair remakes that alone."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli
from la.errors import InputError
from pipelines.config import FeaturizeConfig, VerifyConfig
from pipelines.store.featurize import featurize
from pipelines.store.reader import FeatureStore
from pipelines.store.verify import verify
from pipelines.workspace import locked
from tests.conftest import TINY

SHARD = "train/part-00001.parquet"


@pytest.fixture
def config(tiny_coco: Path, tiny_weights: Path, tmp_path: Path) -> VerifyConfig:
    make(tiny_coco, tiny_weights, tmp_path)
    return VerifyConfig(workspace=tmp_path / "ws", weights=tiny_weights, threads=1)


def make(coco: Path, weights: Path, folder: Path, **changes) -> Path:
    settings = {"coco_dir": coco, "weights": weights, "threads": 1, "shard_size": 5, "batch_size": 3} | TINY | changes
    return featurize(FeaturizeConfig(workspace=folder / "ws", **settings)).store


def store_of(config: VerifyConfig) -> FeatureStore:
    return FeatureStore(next((config.workspace / "features").iterdir()))


def times(store: FeatureStore) -> dict[str, int]:
    return {file: (store.path / file).stat().st_mtime_ns for file in store.info.shards}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def middle_of_features(store: FeatureStore, image_id: int) -> int:
    return (store.path / SHARD).read_bytes().index(store.read(image_id).tobytes()) + 40


DAMAGES = {
    "truncated": lambda store, path: path.write_bytes(path.read_bytes()[:-300]),
    "empty": lambda store, path: path.write_bytes(b""),
    "missing": lambda store, path: path.unlink(),
    "one bit of the features": lambda store, path: flip(path, middle_of_features(store, 106)),
    "another shard": lambda store, path: path.write_bytes((store.path / "train/part-00002.parquet").read_bytes()),
}


def test_a_good_store_is_good_and_its_photos_give_what_is_stored(config):
    report = verify(config)
    assert (report.bad, report.shards, report.images, report.sampled) == ({}, 6, 26, 8)
    assert report.difference < 0.01
    assert verify(config.model_copy(update={"sample": 99})).sampled == 26


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_shard_is_found_and_remade_alone_bit_for_bit(config, damage):
    store = store_of(config)
    before, content = times(store), (store.path / "store.json").read_text()
    DAMAGES[damage](store, store.path / SHARD)
    found = verify(config)
    assert list(found.bad) == [SHARD]
    assert SHARD in found.bad[SHARD]
    repaired = verify(config.model_copy(update={"repair": True}))
    assert (repaired.bad, repaired.repaired) == ({}, {SHARD: "made again, bit for bit"})
    assert {file for file, at in times(store).items() if at != before[file]} == {SHARD}
    assert (store.path / "store.json").read_text() == content
    assert list(FeatureStore(store.path).verify()) == sorted(store.info.shards)


@pytest.mark.parametrize("name", ["index.parquet", "annotations-train.parquet"])
def test_bad_tables_are_found_and_written_again_without_featurizing(config, name, monkeypatch):
    store = store_of(config)
    whole = (store.path / name).read_bytes()
    (store.path / name).write_bytes(whole[:-30])
    assert list(verify(config).bad) == [name]
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.store.shard_maker.load_backbone", lambda *a: pytest.fail("the model was loaded"))
        repaired = verify(config.model_copy(update={"repair": True}))
    assert (repaired.bad, repaired.repaired) == ({}, {name: "made again"})
    assert (store.path / name).read_bytes() == whole


def test_an_index_that_disagrees_is_found(config):
    import pyarrow.parquet as pq

    store = store_of(config)
    file = store.path / "index.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(0, table.num_rows - 1), file)
    assert "lists 5 images of val, but store.json counts 6" in verify(config).bad["index.parquet"]


def test_features_of_another_photo_are_found_though_every_checksum_is_right(config, tiny_coco):
    photos = tiny_coco / "val2017"
    (photos / "000000000200.jpg").write_bytes((tiny_coco / "train2017/000000000103.jpg").read_bytes())
    report = verify(config.model_copy(update={"sample": 99}))
    assert list(report.bad) == ["val/part-00000.parquet"]
    assert "000000000200.jpg are off by" in report.bad["val/part-00000.parquet"]


def test_an_int8_store_is_verified_and_repaired_too(tiny_coco, tiny_weights, tmp_path):
    store = FeatureStore(make(tiny_coco, tiny_weights, tmp_path, dtype="int8"))
    config = VerifyConfig(workspace=tmp_path / "ws", weights=tiny_weights, threads=1, repair=True)
    assert verify(config).difference < 0.02
    (store.path / SHARD).unlink()
    assert verify(config).repaired == {SHARD: "made again, bit for bit"}


def test_skipped_photos_stay_skipped(tiny_coco, tiny_weights, tmp_path):
    photo = tiny_coco / "train2017/000000000107.jpg"
    photo.write_bytes(photo.read_bytes()[:400])
    store = FeatureStore(make(tiny_coco, tiny_weights, tmp_path, skip_bad=True))
    config = VerifyConfig(workspace=tmp_path / "ws", weights=tiny_weights, threads=1, repair=True)
    (store.path / SHARD).unlink()
    report = verify(config)
    assert (report.bad, report.images, report.repaired) == ({}, 25, {SHARD: "made again, bit for bit"})


def test_without_photos_or_weights_the_files_are_checked_and_a_repair_says_what_it_lacks(config, tiny_coco):
    bare = config.model_copy(update={"weights": None})
    report = verify(bare)
    assert (report.bad, report.sampled) == ({}, 0)
    assert "--weights" in report.not_sampled
    store = store_of(config)
    (store.path / SHARD).unlink()
    with pytest.raises(InputError, match="--repair would make the features with weights"):
        verify(bare.model_copy(update={"repair": True}))
    tiny_coco.rename(tiny_coco.with_name("moved"))
    assert "--coco-dir" in verify(config).not_sampled
    moved = config.model_copy(update={"coco_dir": tiny_coco.with_name("moved"), "repair": True})
    assert verify(moved).bad == {}


def test_a_repair_with_other_annotations_is_refused(config, tiny_coco):
    (store_of(config).path / SHARD).unlink()
    file = tiny_coco / "annotations/instances_train2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    with pytest.raises(InputError, match="--repair would make the features with annotations"):
        verify(config.model_copy(update={"repair": True}))


def test_the_verb_exits_with_1_until_it_is_repaired(config, tiny_weights):
    store = store_of(config)
    arguments = ["verify", "--workspace", str(config.workspace), "--weights", str(tiny_weights), "--threads", "1"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    DAMAGES["truncated"](store, store.path / SHARD)
    told = CliRunner().invoke(cli.app, arguments)
    assert told.exit_code == 1
    assert "1 bad files" in " ".join(told.output.split())
    assert CliRunner().invoke(cli.app, [*arguments, "--repair"]).exit_code == 0
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0


def test_verbs_that_write_a_store_are_refused_while_another_does(config, tiny_weights):
    store = store_of(config)
    features, workspace = store.path.parent, ["--workspace", str(config.workspace)]
    int8 = features / store.info.settings.model_copy(update={"dtype": "int8"}).key
    repair = ["verify", *workspace, "--weights", str(tiny_weights), "--threads", "1", "--store", store.key]
    pull = ["pull", features.as_uri(), *workspace, "--store", store.key]
    with locked(store.path, wait=False), locked(int8, wait=False):
        assert CliRunner().invoke(cli.app, repair).exit_code == 0, "it only reads"
        for arguments in ([*repair, "--repair"], ["convert", *workspace], pull):
            refused = CliRunner().invoke(cli.app, arguments)
            assert refused.exit_code == 2
            assert "is in use" in refused.output
    for arguments in ([*repair, "--repair"], ["convert", *workspace], pull):
        assert CliRunner().invoke(cli.app, arguments).exit_code == 0
