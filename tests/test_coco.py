"""COCO folders and masks."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle_tools

from la.data.coco import IGNORED, VOID, Dataset, decode, find_splits, label_map, load_coco
from la.data.rle import run_lengths
from la.errors import InputError
from tests.conftest import CROWDED, DOG, EMPTY, GREY, PERSON
from tests.test_folds import COCO_IDS, FOLD_0


def train(root: Path) -> Dataset:
    return load_coco(*find_splits(root)["train"], "train")


def edit(root: Path, change: Callable[[dict], object]) -> None:
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_void_pixels_are_ignored_whatever_the_classes(tiny_coco):
    runs = [0, 6, 48 * 64 - 6]  # the first six pixels of the first column
    edit(tiny_coco, lambda c: c["images"][0].update(void_rle={"size": [48, 64], "counts": runs}))
    data = train(tiny_coco)
    image_id = min(data.images)
    for classes in ((PERSON,), (DOG,)):
        labels = label_map(data, image_id, classes)
        assert (labels[:6, 0] == IGNORED).all()
        assert (labels == IGNORED).sum() == 6
    assert VOID not in data.class_areas[image_id]


def test_a_folder_is_read_as_it_lies(tiny_coco):
    data = train(tiny_coco)
    assert list(data.images) == list(range(100, 120))
    assert data.categories == {PERSON: "person", DOG: "dog"}
    one = data.annotations[101][0]
    assert (one.category_id, one.is_crowd, one.box) == (DOG, False, (3.5, 3.0, 23.5, 23.0))
    assert one.area == decode([one], 48, 64).sum()
    assert abs(one.area - 400) <= 40


def test_photos_without_annotations_and_grey_photos_stay(tiny_coco):
    data = train(tiny_coco)
    assert data.annotations[100 + EMPTY] == ()
    assert data.class_areas[100 + EMPTY] == {}
    assert 100 + GREY in data.images


def test_a_crowd_is_ignored_but_where_an_object_stands(tiny_coco):
    data = train(tiny_coco)
    image_id = 100 + CROWDED
    objects, crowd = sorted(data.annotations[image_id], key=lambda a: a.is_crowd)
    assert crowd.is_crowd
    assert crowd.area == 24 * 64
    assert PERSON not in data.class_areas[image_id]
    labels = label_map(data, image_id, [PERSON, DOG])
    assert (labels[24:] == IGNORED).all()
    assert (labels[:24][decode([objects], 48, 64)[:24] > 0] == 2).all()
    assert not (label_map(data, image_id, [DOG]) == IGNORED).any()


def test_the_smaller_of_two_overlapping_objects_wins(tiny_coco):
    small = {"id": 7, "image_id": 100, "category_id": DOG, "iscrowd": 0, "bbox": [5, 5, 6, 6]}
    small["segmentation"] = [[5, 5, 11, 5, 11, 11, 5, 11]]
    edit(tiny_coco, lambda content: content["annotations"].append(small))
    labels = label_map(train(tiny_coco), 100, [PERSON, DOG])
    assert labels[8, 8] == 2
    assert labels[18, 18] == 1


def test_images_of_a_class_are_those_with_enough_of_it(tiny_coco):
    data = train(tiny_coco)
    assert data.images_by_class(1)[PERSON] == [100 + n for n in range(0, 20, 2) if n != EMPTY]
    assert data.images_by_class(10_000) == {PERSON: [], DOG: []}


def test_the_order_in_a_file_does_not_matter(tiny_coco):
    before = train(tiny_coco)
    edit(tiny_coco, lambda content: [content[k].reverse() for k in ("images", "annotations", "categories")])
    assert train(tiny_coco) == before
    assert train(tiny_coco).digest == before.digest


def test_the_digest_sees_a_change_of_one_annotation(tiny_coco):
    before = train(tiny_coco).digest
    edit(tiny_coco, lambda content: content["annotations"][0].update(category_id=DOG))
    assert train(tiny_coco).digest != before


def test_an_annotation_of_an_absent_image_is_named(tiny_coco):
    edit(tiny_coco, lambda content: content["annotations"][3].update(image_id=999))
    with pytest.raises(InputError, match=r"instances_train2017.json: annotation 1030 is of image 999"):
        train(tiny_coco)


def test_an_annotation_of_an_unknown_category_is_named(tiny_coco):
    edit(tiny_coco, lambda content: content["annotations"][0].update(category_id=77))
    with pytest.raises(InputError, match="annotation 1000 has category 77"):
        train(tiny_coco)


def test_a_photo_that_is_not_there_is_named(tiny_coco):
    (tiny_coco / "train2017/000000000102.jpg").unlink()
    with pytest.raises(InputError, match=r"image 102 names 000000000102.jpg, which is not in .*train2017"):
        train(tiny_coco)


@pytest.mark.parametrize(
    "change",
    [
        {"segmentation": None},
        {"segmentation": [[1, 2]]},
        {"segmentation": {"size": [48, 64]}},
        {"segmentation": {"size": [64, 48], "counts": [64 * 48]}},
        {"bbox": [1, 2, -3, 4]},
        {"bbox": [1, 2, float("nan"), 4]},
        {"bbox": [1, 2]},
    ],
)
def test_an_unusable_annotation_is_named(tiny_coco, change):
    edit(tiny_coco, lambda content: content["annotations"][0].update(change))
    with pytest.raises(InputError, match=r"instances_train2017.json: annotation 1000"):
        train(tiny_coco)


@pytest.mark.parametrize("field", ["id", "file_name", "height"])
def test_an_image_without_a_field_is_told(tiny_coco, field):
    edit(tiny_coco, lambda content: content["images"][0].pop(field))
    with pytest.raises(InputError, match="lacks a usable id, file_name, height or width"):
        train(tiny_coco)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": [], "annotations": []}'])
def test_a_file_that_is_not_coco_is_named(tiny_coco, content):
    (tiny_coco / "annotations/instances_train2017.json").write_text(content)
    with pytest.raises(InputError, match=r"instances_train2017.json is not a COCO instances file"):
        train(tiny_coco)


def test_the_newest_year_is_taken_unless_one_is_named(tiny_coco):
    (tiny_coco / "train2014").mkdir()
    (tiny_coco / "annotations/instances_train2014.json").write_text("{}")
    assert find_splits(tiny_coco)["train"][1].name == "train2017"
    assert find_splits(tiny_coco, {"train": "train2014"})["train"][1].name == "train2014"


def test_a_missing_folder_or_split_is_named(tiny_coco, tmp_path):
    with pytest.raises(InputError, match=r"none is not a folder"):
        find_splits(tmp_path / "none")
    (tiny_coco / "annotations/instances_val2017.json").unlink()
    with pytest.raises(InputError, match=r"no val split.*found instances_train2017.json; folders .*train2017"):
        find_splits(tiny_coco)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=40))
def test_run_lengths_are_those_of_the_mask(rows):
    mask = np.asfortranarray(np.array(rows, np.uint8))
    runs = run_lengths(rle_tools.encode(mask)["counts"])
    ends = np.cumsum(runs)
    rebuilt = np.zeros(mask.size, np.uint8)
    for start, end in zip(ends[::2], ends[1::2], strict=False):
        rebuilt[start:end] = 1
    assert ends[-1] == mask.size
    assert np.array_equal(rebuilt.reshape(mask.shape, order="F"), mask)


def test_the_real_folder_is_read_whole(real_coco):
    splits = find_splits(real_coco)
    data = {split: load_coco(*splits[split], split) for split in splits}
    assert [len(data[s].images) for s in ("train", "val")] == [214, 108]
    assert sorted(data["train"].categories) == COCO_IDS
    assert {i: data["train"].categories[i] for i in FOLD_0} == FOLD_0
    every = [a for d in data.values() for found in d.annotations.values() for a in found]
    listed = [one for file, _ in splits.values() for one in json.loads(file.read_text())["annotations"]]
    assert sorted(a.id for a in every) == sorted(one["id"] for one in listed)
    assert {a.id for a in every if a.is_crowd} == {one["id"] for one in listed if one["iscrowd"]} != set()
    assert any(not found for found in data["train"].annotations.values())
