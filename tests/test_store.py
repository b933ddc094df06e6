"""The feature store: what was written comes back, and damage is told."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from la.data.coco import Annotation, Dataset, Image
from la.errors import InputError
from pipelines.store.annotations import read_dataset, write_dataset
from pipelines.store.feature_shards import MappedShard, ShardNote, StoreSettings, shard_file, write_shard
from pipelines.store.reader import FeatureStore, SplitInfo, StoreInfo, finish_store
from pipelines.workspace import Workspace

SHAPE = (3, 3, 5)
CATEGORIES = {1: "person", 18: "dog"}
SETTINGS = StoreSettings(
    annotations={"train": "a", "val": "b"},
    backbone="vit",
    weights="sha256:c",
    image_size=24,
    preprocessing={"mean": [0.5]},
    layer="last",
)


def annotation(image_id: int, number: int, is_crowd: bool = False) -> Annotation:
    return Annotation(10 * image_id + number, image_id, 18, is_crowd, 7, (0.1, 1 / 3, 9.0, 9.5), b"PPYo1" * number)


def dataset(split: str, ids: range) -> Dataset:
    images = {i: Image(i, f"{i}.jpg", 10 + i, 20) for i in ids}
    annotations = {i: tuple(annotation(i, n, n == 2) for n in range(i % 3)) for i in ids}
    return Dataset(split, images, CATEGORIES, annotations)


@pytest.fixture
def features() -> dict[int, np.ndarray]:
    generator = np.random.default_rng(0)
    return {i: generator.normal(size=SHAPE).astype(np.float16) for i in range(1, 13)}


@pytest.fixture
def store(tmp_path: Path, features: dict[int, np.ndarray]) -> FeatureStore:
    path = tmp_path / "features" / SETTINGS.key
    datasets = {"train": dataset("train", range(1, 9)), "val": dataset("val", range(9, 13))}
    shards = {}
    for split, content in datasets.items():
        images = list(content.images.values())
        for number, part in enumerate((images[:3], images[3:])):
            note = ShardNote(
                key=SETTINGS.key,
                split=split,
                number=number,
                image_ids=[image.id for image in part],
                skipped={},
                weights_digest="d",
                patch_size=8,
                channels=SHAPE[2],
                grid=SHAPE[:2],
            )
            file = shard_file(split, number)
            rows = ((image, features[image.id]) for image in part)
            shards[file] = write_shard(path / file, SETTINGS, note, rows).features_sha256
    info = StoreInfo(
        key=SETTINGS.key,
        settings=SETTINGS,
        weights_digest="d",
        patch_size=8,
        channels=SHAPE[2],
        grid=SHAPE[:2],
        splits={
            s: SplitInfo(name=f"{s}2017", images=len(d.images), annotations=0, skipped={}) for s, d in datasets.items()
        },
        shards=shards,
        coco_dir="coco",
        software={},
    )
    finish_store(path, info, datasets)
    return FeatureStore(path)


def test_features_come_back_bit_for_bit(store, features):
    for image_id, expected in features.items():
        found = store.read(image_id)
        assert found.dtype == np.float16
        assert np.array_equal(found, expected)


def test_a_batch_keeps_the_order_asked_for_and_may_repeat_images(store, features):
    batch = store.read_batch([11, 2, 2, 7])
    assert batch.dtype == torch.float16
    assert batch.shape == (4, *SHAPE)
    assert np.array_equal(batch, np.stack([features[i] for i in (11, 2, 2, 7)]))
    assert store.read_batch([]).shape == (0, *SHAPE)


def test_a_view_of_the_store_cannot_be_written_to(store):
    with pytest.raises(ValueError, match="read-only"):
        store.read(1)[0] = 0


def test_any_parquet_reader_reads_a_shard(store, features):
    file = pq.ParquetFile(store.path / "train/part-00000.parquet", page_checksum_verification=True)
    table = file.read()
    assert table["image_id"].to_pylist() == [1, 2, 3]
    assert table["height"].to_pylist() == [11, 12, 13]
    assert table["features"][1].as_py() == features[2].astype("<f2").tobytes()
    assert file.metadata.num_row_groups == 3
    assert file.metadata.row_group(0).column(3).compression == "UNCOMPRESSED"
    assert json.loads(file.schema_arrow.metadata[b"la_settings"])["image_size"] == 24


def test_datasets_come_back_equal(store):
    assert store.dataset("train") == dataset("train", range(1, 9))
    assert store.dataset("val") == dataset("val", range(9, 13))
    assert store.dataset("val").digest == dataset("val", range(9, 13)).digest
    assert store.image_ids("val") == [9, 10, 11, 12]


@pytest.mark.parametrize("ids", [range(0), range(3, 4)])
def test_datasets_without_images_or_annotations_come_back_equal(tmp_path, ids):
    write_dataset(tmp_path / "a.parquet", dataset("train", ids))
    assert read_dataset(tmp_path / "a.parquet") == dataset("train", ids)


def test_a_store_says_what_it_was_made_from(store):
    info = store.info
    assert (info.key, info.backbone, info.image_size, info.grid) == (SETTINGS.key, "vit", 24, (3, 3))
    assert info.dtype == "float16"
    assert store.key == store.path.name


@pytest.mark.parametrize("change", [{"backbone": "x"}, {"weights": "x"}, {"image_size": 32}, {"layer": "x"},
                                    {"dtype": "int8"}, {"preprocessing": {}}, {"annotations": {}}])  # fmt: skip
def test_every_setting_changes_the_key(change):
    assert SETTINGS.model_copy(update=change).key != SETTINGS.key


def test_another_process_reads_the_same(store, features, tmp_path):
    store.read(1)  # open files must not travel
    (tmp_path / "store.pickle").write_bytes(pickle.dumps(store))
    script = (
        "import pickle, sys; s = pickle.load(open(sys.argv[1], 'rb')); sys.stdout.buffer.write(s.read(12).tobytes())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store.pickle")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=True,
    )
    assert run.stdout == features[12].tobytes()


def test_the_workspace_finds_it(store, tmp_path):
    assert Workspace(tmp_path).find_store() == store.path
    (store.path / "store.json").unlink()
    with pytest.raises(InputError, match=rf"not finished, {store.path.name}\. Run the same"):
        Workspace(tmp_path).find_store()
    with pytest.raises(InputError, match="holds no features"):
        Workspace(tmp_path / "empty").find_store()


def test_an_unknown_image_is_named(store):
    with pytest.raises(InputError, match=r"image 99 is not in the store .* \(12 images\)"):
        store.read(99)


def test_an_unknown_split_is_named(store):
    with pytest.raises(InputError, match=r"no split 'test'; choose train or val"):
        store.dataset("test")


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "text"])
@pytest.mark.parametrize("name", ["train/part-00000.parquet", "index.parquet", "annotations-train.parquet"])
def test_a_damaged_file_is_named_with_what_to_do(store, damage, name):
    file = store.path / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "remove":
        file.write_bytes({"truncate": whole[: len(whole) // 2], "empty": b"", "text": b"<html>" * 99}[damage])
    with pytest.raises(InputError, match=rf"{name} is missing, damaged.*run `featurize` again"):
        store.read(1), store.dataset("train")


def test_verifying_finds_a_single_flipped_bit(store):
    assert list(store.verify()) == sorted(store.info.shards)
    file = store.path / "val/part-00001.parquet"
    content = bytearray(file.read_bytes())
    place = content.index(store.read(12).tobytes())
    content[place + 4] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"val/part-00001.parquet is missing, damaged.*checksum"):
        list(FeatureStore(store.path).verify())


def test_a_shard_of_another_store_is_refused(store):
    with pytest.raises(InputError, match="made with other settings"):
        MappedShard(store.path / "val/part-00000.parquet", "another", SHAPE)


def test_a_shard_of_another_shape_is_refused(store):
    with pytest.raises(InputError, match="not one plain image of 1152 bytes"):
        MappedShard(store.path / "val/part-00000.parquet", SETTINGS.key, (24, 24, 1))


def test_a_store_of_another_format_is_refused(store):
    edit(store, lambda content: content["settings"].update(format=99))
    with pytest.raises(InputError, match=r"store.json is of store format 99; this version reads format 1"):
        FeatureStore(store.path).read(1)


def test_a_store_whose_settings_were_edited_is_refused(store):
    edit(store, lambda content: content["settings"].update(image_size=999))
    with pytest.raises(InputError, match="its settings give"):
        FeatureStore(store.path).read(1)


def test_an_incomplete_store_is_refused(store):
    (store.path / "store.json").unlink()
    with pytest.raises(InputError, match="no complete feature store"):
        FeatureStore(store.path).read(1)


def edit(store: FeatureStore, change) -> None:
    file = store.path / "store.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
