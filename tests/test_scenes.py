"""The demo's data set is a faithful, repeatable COCO download, and its backbone's weights load."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from pycocotools.coco import COCO
from safetensors.torch import load_file

import la.backbone.vit_demo  # noqa: F401  (makes the model known to timm)
from la.predictor.checkpoint import BUNDLED_WEIGHTS
from pipelines.demo import drawing, scenes
from tools.demo_pretrain import other_objects, pretrain

WEIGHTS = BUNDLED_WEIGHTS["vit_demo_patch8_128"]
SMALL = {"train_images": 12, "val_images": 8}


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return scenes.draw_scenes(tmp_path_factory.mktemp("small") / "coco", **SMALL)


def test_same_arguments_give_the_same_bytes(small, tmp_path):
    again = scenes.draw_scenes(tmp_path / "again", **SMALL)
    assert digests(again) == digests(small)


def test_other_seed_and_other_split_give_other_images():
    one = scenes.draw_scene(0, "train2017", 0).image
    assert (one != scenes.draw_scene(1, "train2017", 0).image).any()
    assert (one != scenes.draw_scene(0, "val2017", 0).image).any()


def test_image_does_not_depend_on_how_many_are_drawn(small, tmp_path):
    longer = scenes.draw_scenes(tmp_path / "longer", train_images=20, val_images=8)
    name = "train2017/000000000012.jpg"
    assert (longer / name).read_bytes() == (small / name).read_bytes()
    first, second = small / "val2017/000000000013.jpg", longer / "val2017/000000000021.jpg"
    assert first.read_bytes() == second.read_bytes()


def test_complete_folder_is_kept_and_other_arguments_replace_it(tmp_path):
    root = scenes.draw_scenes(tmp_path / "coco", train_images=2, val_images=1)
    stamp = (root / "scenes.json").stat().st_mtime_ns
    assert scenes.draw_scenes(root, train_images=2, val_images=1) == root
    assert (root / "scenes.json").stat().st_mtime_ns == stamp
    scenes.draw_scenes(root, train_images=3, val_images=1)
    assert len(list((root / "train2017").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]


def test_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError):
        scenes.draw_scenes(tmp_path, train_images=1, val_images=1)
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "draw_scene", fail)
    with pytest.raises(OSError, match="disk full"):
        scenes.draw_scenes(tmp_path / "coco", train_images=1, val_images=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"size": (32, 128)}, {"train_images": 0}, {"val_images": 0}])
def test_bad_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="at least 64 pixels"):
        scenes.draw_scenes(tmp_path / "coco", **arguments)


def test_pycocotools_reads_the_visible_masks(tmp_path):
    root = scenes.draw_scenes(tmp_path / "coco", train_images=10, val_images=30, size=(96, 144), seed=3)
    seen_ids: set[int] = set()
    for split in scenes.SPLITS:
        coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
        assert sorted(coco.cats) == list(range(1, 81))
        assert not seen_ids & set(coco.imgs)
        seen_ids |= set(coco.imgs)
        for number, (image_id, image) in enumerate(coco.imgs.items()):
            picture = Image.open(root / split / image["file_name"])
            assert (picture.height, picture.width) == (image["height"], image["width"]) == (96, 144)
            instances = scenes.draw_scene(3, split, number, (96, 144)).instances
            total = np.zeros((96, 144), int)
            for k, annotation in enumerate(coco.imgToAnns[image_id], start=1):
                mask = coco.annToMask(annotation)
                assert (mask == (instances == k)).all()
                x, y, width, height = (int(value) for value in annotation["bbox"])
                assert mask.sum() == mask[y : y + height, x : x + width].sum() == annotation["area"] > 0
                assert annotation["iscrowd"] == 0
                total += mask
            assert total.max() == 1


def test_every_class_is_in_enough_scenes():
    # Placing needs the drawing itself, so this counts a quarter of the val split's rounds and scales.
    found = defaultdict(set)
    for number in range(80):
        for thing in scenes.draw_scene(0, "val2017", number).things:
            found[thing.shape, thing.texture].add(number)
    assert set(found) == set(scenes.PAIRS)
    assert min(len(numbers) for numbers in found.values()) >= 2
    for fold in range(scenes.FOLDS):
        assert sum(len(found[pair]) for pair in scenes.PAIRS[fold :: scenes.FOLDS]) >= 40


@pytest.mark.parametrize("fold", range(scenes.FOLDS))
def test_held_out_classes_are_new_pairs_of_known_parts(fold):
    unseen = set(scenes.PAIRS[fold :: scenes.FOLDS])
    seen = set(scenes.PAIRS) - unseen
    assert (len(unseen), len(seen)) == (20, 60)
    assert {shape for shape, _ in unseen} == {shape for shape, _ in seen} == set(range(10))
    assert {texture for _, texture in unseen} == {texture for _, texture in seen} == set(range(8))
    assert len(set(scenes.CLASS_NAMES)) == 80


def test_pretraining_kinds_are_not_the_classes():
    pool = pretrain.draw_pool(2, seed=0)
    assert pool["images"].shape == (2, 128, 128, 3)
    assert pool["kinds"][..., 0].max() < pretrain.OUTLINES
    rng = np.random.default_rng([0, 0])
    for outline in (other_objects.random_outline(rng) for _ in range(pretrain.OUTLINES)):
        assert not any(
            outline.shape == shape.shape and np.allclose(outline, shape, atol=0.05) for shape in drawing.SHAPES.values()
        )


def test_measures_ignore_turns_and_tell_shapes_apart():
    turn = np.array([[np.cos(1.0), np.sin(1.0)], [-np.sin(1.0), np.cos(1.0)]])
    rows = {name: other_objects.measure_outline(outline) for name, outline in drawing.SHAPES.items()}
    for name, outline in drawing.SHAPES.items():
        turned = other_objects.measure_outline(0.5 * outline @ turn + 7)
        assert np.abs(turned - rows[name]).max() < 0.15
        assert np.abs(turned - rows[name]).mean() < 0.04
    assert rows["disc"][0] > 0.9 > rows["square"][0]
    assert rows["star"][7] == max(rows["star"][3:11])  # five waves around
    striped = other_objects.measure_texture(drawing.TEXTURES["striped"])
    ringed = other_objects.measure_texture(drawing.TEXTURES["ringed"])
    assert abs(striped[12]) < 0.1 < 0.8 < ringed[12]  # edges that point at the centre


def test_weights_load_strictly_and_are_small():
    assert WEIGHTS.stat().st_size < 8_000_000
    model = timm.create_model("vit_demo_patch8_128")
    state = load_file(WEIGHTS)
    assert {str(value.dtype) for value in state.values()} == {"torch.float16"}
    model.load_state_dict(state, strict=True)
    assert model.num_classes == 0
    assert model.default_cfg["mean"] == (0.5, 0.5, 0.5)


def test_record_tells_the_arguments(small):
    record = json.loads((small / "scenes.json").read_text())
    assert (record["train_images"], record["val_images"], record["seed"]) == (12, 8, 0)
