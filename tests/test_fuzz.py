"""Damaged and hostile files of every kind end in an InputError or are read; nothing else ever comes out.

`FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py` tries more, and others each time.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from pycocotools import mask as rle_tools

from la.backbone.vit import _read_state
from la.data.coco import Dataset, label_map, load_coco
from la.data.photos import read_photo
from la.episodes.pool import Pool
from la.errors import InputError
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import EpisodePlan, ensure_episodes
from pipelines.runs.checkpoints import load, save
from pipelines.store.feature_shards import ShardNote, StoreSettings, shard_file, write_shard
from pipelines.store.reader import FeatureStore, SplitInfo, StoreInfo, finish_store

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
HEIGHT, WIDTH, GRID, CHANNELS = 24, 32, (2, 2), 3
TESTED = EpisodePlan("fuzz-test", 0, "val", "all", 0, ((1, 2, 1),), 12, prompt="mixed", min_area=1)
TRAINED = EpisodePlan(
    "fuzz-train", 0, "val", "all", 0, ((2, 1, 1), (1, 2, 1)), 6, mixed=("mask", "point", "box"), min_area=1
)
JUNK: list = [None, True, 0, -1, 1, 7, 2**31, 2**63, 10**400, -0.5, 1e308, float("nan"), float("inf"), "", "x", "../x",
              "\x00", "\ud800", "`0", [], {}, [[]], [0], [1, 2, 3, 4], [[1, 2]], {"size": [1, 1]}, [{}]]  # fmt: skip


def fuzz(share: float = 1.0) -> Callable:
    """Settings of a fuzz test; `share` of the usual number of examples, for those that take long."""
    return settings(
        max_examples=EXAMPLES or max(1, int(100 * share)),
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def content_of_coco() -> dict:
    """An annotation file of six photos with all that may stand in one."""
    images, annotations = [], []
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[2:20, 3:25] = 1
    packed = rle_tools.encode(mask)["counts"].decode()
    runs = [12, 12] * WIDTH
    for n in range(6):
        images.append({"id": 10 + n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH})
        shapes = [[[1, 1, 20, 1, 20, 15, 1.5, 15], [4, 4, 9, 4, 9, 26]], {"size": [HEIGHT, WIDTH], "counts": packed}]
        for k, shape in enumerate(shapes):
            one = {"id": 100 * n + k, "image_id": 10 + n, "category_id": 1 + (n + k) % 2, "iscrowd": 0}
            annotations.append(one | {"segmentation": shape, "bbox": [1, 1, 19, 14.5]})
    annotations[3] |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs}}
    del annotations[4]["bbox"]
    images[1]["void_rle"] = {"size": [HEIGHT, WIDTH], "counts": runs}
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos with a sound annotation file, instances.json."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / "photos").mkdir()
    for image in content_of_coco()["images"]:
        Pillow.new("RGB", (WIDTH, HEIGHT), (90, 20, image["id"])).save(root / "photos" / image["file_name"])
    (root / "instances.json").write_text(json.dumps(content_of_coco()))
    use_dataset(load_coco(root / "instances.json", root / "photos", "train"))
    return root


@pytest.fixture(scope="module")
def study(coco: Path) -> Path:
    """A workspace with a store of two splits and two sets of episodes, without a ViT."""
    datasets = {"train": load_coco(coco / "instances.json", None, "train")}
    moved = content_of_coco()
    for raw in (*moved["images"], *moved["annotations"]):
        raw["id"] += 5000
    for raw in moved["annotations"]:
        raw["image_id"] += 5000
    (coco / "moved.json").write_text(json.dumps(moved))
    datasets["val"] = load_coco(coco / "moved.json", None, "val")
    what = StoreSettings(annotations={}, backbone="v", weights="w", image_size=16, preprocessing={}, layer="l")
    path, generator, shards = coco / "study" / "features" / what.key, np.random.default_rng(0), {}
    about = {"weights_digest": "d", "patch_size": 8, "channels": CHANNELS, "grid": GRID}
    for split, dataset in datasets.items():
        ids = list(dataset.images)
        note = ShardNote(key=what.key, split=split, number=0, image_ids=ids, skipped={}, **about)
        rows = ((i, generator.normal(size=(*GRID, CHANNELS)).astype(np.float16)) for i in dataset.images.values())
        shards[shard_file(split, 0)] = write_shard(path / shard_file(split, 0), what, note, rows).features_sha256
    splits = {s: SplitInfo(name=s, images=6, annotations=12, skipped={}) for s in datasets}
    info = StoreInfo(key=what.key, settings=what, splits=splits, shards=shards, coco_dir="", software={}, **about)
    finish_store(path, info, datasets)
    use_study(coco / "study")
    return coco / "study"


def use_dataset(data: Dataset) -> None:
    """All that is ever done with annotations."""
    pool = Pool(data, list(data.categories), 1)
    for image in data.images:
        label_map(data, image, list(data.categories))
    for image in data.annotations:
        for one in (one for category in data.categories for one in pool.annotations_of(image, category)):
            pool.interior(one).points(lambda: 0.5)
    assert len(data.digest) == 16


def use_study(root: Path) -> None:
    """All that is read of a store and its episodes."""
    store = FeatureStore(next((root / "features").iterdir()))
    for split in ("train", "val"):
        use_dataset(store.dataset(split))
        for image in store.image_ids(split):
            store.read_batch([image])
    list(store.verify())
    builder = BatchBuilder(store, "val")
    for plan in (TESTED, TRAINED):
        shards = ensure_episodes(plan, store)
        assert len(shards.digest) == 16
        for episode in shards:
            builder.pack([episode])
            builder.truth([episode])
    shards.batch(1, 3)


def only_input_errors(use: Callable[[], object]) -> None:
    with suppress(InputError):
        use()


def nodes(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all nodes of a JSON-like value but the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from nodes(inner, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, value: object) -> object:
    """A JSON-like value with one to three nodes replaced by junk or by another node, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(nodes(value))
        if not paths:
            return value
        path = draw(st.sampled_from(paths))
        holder, key = at(value, path[:-1]), path[-1]
        match draw(st.sampled_from(("junk", "other", "remove", "double"))):
            case "junk":
                holder[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
            case "other":
                holder[key] = copy.deepcopy(at(value, draw(st.sampled_from(paths))))
            case "remove":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
    return value


def at(value: object, path: tuple) -> object:
    for key in path:
        value = value[key]
    return value


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with some flipped, cut off, or a stretch of them replaced."""
    content = bytearray(whole)
    if draw(st.integers(0, 4)) == 0:
        del content[draw(st.integers(0, len(content))) :]
    for _ in range(draw(st.integers(1, 4))):
        if content:
            place = draw(st.integers(0, len(content) - 1))
            content[place : place + draw(st.sampled_from((1, 1, 4, 16)))] = draw(st.binary(min_size=0, max_size=8))
    return bytes(content)


@fuzz(3)
@given(data=st.data())
def test_annotation_files_with_any_node_changed(coco, data):
    content = data.draw(mutated(content_of_coco()))
    (coco / "mutated.json").write_text(json.dumps(content))
    only_input_errors(lambda: use_dataset(load_coco(coco / "mutated.json", coco / "photos", "train")))


@fuzz(2)
@given(data=st.data())
def test_annotation_files_with_bytes_changed(coco, data):
    (coco / "damaged.json").write_bytes(data.draw(damaged((coco / "instances.json").read_bytes())))
    only_input_errors(lambda: use_dataset(load_coco(coco / "damaged.json", coco / "photos", "train")))


@fuzz(0.25)
@given(data=st.data())
def test_files_of_a_study_with_bytes_changed(study, data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(study, Path(folder) / "study"))
        file = data.draw(st.sampled_from(sorted(p for p in root.rglob("*.*") if p.is_file())))
        file.write_bytes(data.draw(damaged(file.read_bytes())))
        only_input_errors(lambda: use_study(root))


@fuzz(0.25)
@given(data=st.data())
def test_json_files_of_a_study_with_any_node_changed(study, data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(study, Path(folder) / "study"))
        file = data.draw(st.sampled_from(sorted(root.rglob("*.json"))))
        file.write_text(json.dumps(data.draw(mutated(json.loads(file.read_text())))))
        only_input_errors(lambda: use_study(root))


@fuzz(0.25)
@given(data=st.data())
def test_tables_of_a_study_with_any_cell_changed(study, data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(study, Path(folder) / "study"))
        file = data.draw(st.sampled_from(sorted(root.rglob("*.parquet"))))
        table = pq.read_table(file)
        rows = [row for row in data.draw(mutated(table.to_pylist())) if isinstance(row, dict)]
        pq.write_table(table_of(rows, table.schema), file, compression="none", row_group_size=1)
        only_input_errors(lambda: use_study(root))


def table_of(rows: list[dict], schema: pa.Schema) -> pa.Table:
    """The rows as a table; a column that does not fit its type becomes one of another, or is left out."""
    columns, fields = [], []
    for field in schema:
        cells = [row.get(field.name) for row in rows]
        for kind in (field.type, None):
            try:
                columns.append(pa.array(cells, kind))
                fields.append(pa.field(field.name, columns[-1].type))
                break
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                continue
    return pa.table(columns, pa.schema(fields, schema.metadata))


@fuzz()
@given(data=st.data())
def test_photos_with_bytes_changed(coco, data):
    kind = data.draw(st.sampled_from(("png", "jpeg", "webp", "bmp")))
    if not (photo := coco / f"whole.{kind}").exists():
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Pillow.fromarray(pixels).save(photo)
    (coco / "damaged.photo").write_bytes(data.draw(damaged(photo.read_bytes())))
    only_input_errors(lambda: read_photo(coco / "damaged.photo", 8, (HEIGHT, WIDTH)))
    only_input_errors(lambda: read_photo(coco / "damaged.photo", 8))


@fuzz()
@given(data=st.data())
def test_weights_and_checkpoints_with_bytes_changed(coco, data):
    state = {"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3)}
    whole = {s: coco / f"whole.{s}" for s in ("safetensors", "pth")}
    if not whole["pth"].exists():
        safetensors.torch.save_file(state, whole["safetensors"])
        save(whole["pth"], {"model": state, "step": 3})
    suffix = data.draw(st.sampled_from(sorted(whole)))
    file = coco / f"damaged.{suffix}"
    file.write_bytes(data.draw(damaged(whole[suffix].read_bytes())))
    only_input_errors(lambda: _read_state(file))
    only_input_errors(lambda: load(file))
