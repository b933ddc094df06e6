"""The verb `predict`: support files in, masks, overlays and COCO results out."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from cli import app
from la.errors import InputError
from la.predictor.predictor import Predictor
from la.predictor.support_set import load_supports, save_supports
from la.predictor.user_prompts import Box, Points
from pipelines.bench.query_latency import bench_predict
from pipelines.config import PredictConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.predict.export import export_heads
from pipelines.predict.mask_files import palette
from pipelines.predict.segment_folder import predict
from pipelines.predict.support_files import read_support_files


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A COCO folder of drawn scenes, and in `support.json` two photos of each of two of its classes."""
    root = draw_scenes(tmp_path_factory.mktemp("scenes"), train_images=80, val_images=24)
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    by_class: dict[int, dict[int, dict]] = {}
    for one in content["annotations"]:
        by_class.setdefault(one["category_id"], {})[one["image_id"]] = one
    chosen = sorted(by_class, key=lambda c: -len(by_class[c]))[:2]
    kept = [one for c in chosen for one in list(by_class[c].values())[:2]]
    ids = {one["image_id"] for one in kept}
    images = [image for image in content["images"] if image["id"] in ids]
    (root / "annotations" / "support.json").write_text(json.dumps(content | {"annotations": kept, "images": images}))
    return root


@pytest.fixture
def config(scenes, tmp_path):
    """Six photos, one of them no photo, to be segmented by the demo's checkpoint."""
    queries = tmp_path / "queries"
    queries.mkdir()
    for path in sorted((scenes / "val2017").iterdir())[:5]:
        (queries / path.name).write_bytes(path.read_bytes())
    (queries / "broken.jpg").write_text("no photo")
    return PredictConfig(
        checkpoint="demo",
        support=scenes / "annotations" / "support.json",
        support_images=scenes / "val2017",
        images=queries,
        out=tmp_path / "out",
        device="cpu",
    )


def test_masks_overlays_and_results_say_what_the_predictor_says(config):
    seen = []
    report = predict(config, lambda done, total, rate: seen.append((done, total)))
    assert (report.made, report.already, list(report.skipped)) == (5, 0, ["broken.jpg"])
    assert "cannot be decoded" in report.skipped["broken.jpg"]
    assert seen[-1] == (6, 6)
    predictor = Predictor.from_checkpoint("demo", "cpu")
    read = read_support_files(config.support, None, config.support_images)
    predictor.set_support(read.photos, read.prompts)
    assert predictor.classes == report.classes
    paths = sorted(path for path in config.images.iterdir() if path.name != "broken.jpg")
    masks, scores = predictor.segment(paths)
    assert any(mask.any() for mask in masks)
    coco = COCO(config.out / "photos.json")
    found = coco.loadRes(str(config.out / "results.json"))
    assert {c["name"] for c in coco.dataset["categories"]} == set(report.classes)
    for path, mask, score in zip(paths, masks, scores, strict=True):
        with Image.open(config.out / "masks" / f"{path.stem}.png") as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.asarray(image), mask)
            assert image.getpalette()[3:6] == palette()[1].tolist() == [128, 0, 0]
        with Image.open(config.out / "overlays" / f"{path.stem}.jpg") as image:
            assert image.size == mask.shape[::-1]
        for number, name in enumerate(report.classes):
            category = read.category_ids[name]
            results = found.loadAnns(found.getAnnIds(imgIds=[int(path.stem)], catIds=[category]))
            assert len(results) == int(number + 1 in mask)
            for one in results:
                np.testing.assert_array_equal(found.annToMask(one), mask == number + 1)
                assert one["score"] == pytest.approx(score[number], abs=1e-4)


def test_a_stopped_run_goes_on_and_a_finished_one_has_nothing_to_do(config):
    predict(config)
    wanted = (config.out / "results.json").read_text()
    ledger = config.out / "progress.jsonl"
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # killed while it wrote the third photo
    (config.out / "results.json").unlink()
    report = predict(config)
    assert (report.made, report.already) == (3, 2)
    assert (config.out / "results.json").read_text() == wanted
    assert predict(config).made == 0
    changed = next(path for path in config.images.iterdir() if path.name != "broken.jpg")
    Image.new("RGB", (40, 30)).save(changed, "JPEG")
    assert predict(config).made == 1
    assert predict(config.model_copy(update={"shots": 1})).made == 5  # another result, so anew


def test_saved_classes_stand_in_for_their_photos(config, tmp_path):
    kept = tmp_path / "classes.safetensors"
    predict(config.model_copy(update={"save_prototypes": kept}))
    again = {"support": None, "support_images": None, "prototypes": (kept,), "out": tmp_path / "again"}
    predict(config.model_copy(update=again))
    for path in (config.out / "masks").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "masks" / path.name).read_bytes()


def test_classes_of_another_backbone_are_told_before_any_weights_are_asked_for(config, tmp_path):
    kept = tmp_path / "classes.safetensors"
    predict(config.model_copy(update={"save_prototypes": kept}))
    saved = load_supports(kept)
    other = dataclasses.replace(saved, made_by={**saved.made_by, "backbone": "vit_tiny", "checkpoint": "paper@9"})
    save_supports(kept, other)
    told = r"holds features of vit_tiny at 128 px, but --checkpoint .* takes those of vit_demo.*saved with, paper@9"
    with pytest.raises(InputError, match=told):
        predict(config.model_copy(update={"prototypes": (kept,), "weights": tmp_path / "none"}))
    with pytest.raises(InputError, match=told):
        export_heads("demo", tmp_path / "heads.onnx", prototypes=[kept])


def test_nearest_takes_the_supports_most_like_each_photo(config, scenes):
    """A support photo as the query is nearest to itself: the mask is that of its prompts alone."""
    read = read_support_files(config.support, None, config.support_images)
    name = next(iter(read.prompts[0]))
    chosen = {"classes": (name,), "support_selection": "nearest", "shots": 1, "images": read.photos[0]}
    predict(config.model_copy(update=chosen))
    predictor = Predictor.from_checkpoint("demo", "cpu")
    predictor.set_support(read.photos[:1], [{name: read.prompts[0][name]}])
    with Image.open(config.out / "masks" / f"{read.photos[0].stem}.png") as image:
        np.testing.assert_array_equal(np.asarray(image), predictor.segment(read.photos[:1]).masks[0])
    with pytest.raises(InputError, match="nearest needs --shots"):
        predict(config.model_copy(update=chosen | {"shots": None}))


def test_the_verb_says_what_it_did_and_what_it_left_out(config, tmp_path):
    given = ["--support", config.support, "--support-images", config.support_images, "--out", config.out]
    done = CliRunner().invoke(app, list(map(str, ["predict", "--images", config.images, *given])))
    assert done.exit_code == 0, done.output
    assert "5 photos segmented at" in done.output
    assert "note: 1 photos could not be used" in done.output
    assert "broken.jpg" in done.output
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.png").write_text("no photo")
    failed = CliRunner().invoke(app, list(map(str, ["predict", "--images", tmp_path / "bad", *given])))
    assert failed.exit_code == 2
    assert "no photo could be used" in failed.output
    assert "text.png" in failed.output


def labelme(folder, shapes, name="a.json", **changes):
    Image.new("RGB", (60, 40), "red").save(folder / "a.png")
    content = {"imagePath": "a.png", "imageHeight": 40, "imageWidth": 60, "imageData": None, "shapes": shapes}
    (folder / name).write_text(json.dumps(content | changes))
    return folder


def shape(kind, points, label="cat", **more):
    return {"label": label, "shape_type": kind, "points": points, "flags": {}} | more


def test_labelme_shapes_become_prompts(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (5, 4), 255).save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    shapes = [
        shape("polygon", [[10, 10], [20, 10], [20, 20], [10, 20]]),
        shape("rectangle", [[30, 35], [5, 5]], "dog"),
        shape("point", [[7, 8]], "dog"),
        shape("point", [[50, 30]], "dog", flags={"negative": True}),
        shape("circle", [[30, 20], [35, 20]], "ball"),
        shape("mask", [[3, 6], [7, 9]], "leaf", mask=png),
    ]
    read = read_support_files(labelme(tmp_path, shapes))
    assert read.photos == [tmp_path / "a.png"]
    prompts = read.prompts[0]
    assert prompts["cat"][0][15, 15]
    assert not prompts["cat"][0][25, 25]
    assert prompts["dog"] == [Box(5, 5, 30, 35), Points([(7, 8)]), Points((), [(50, 30)])]
    assert 78 < prompts["ball"][0].sum() < 110  # a radius of 5 pixels, and the edge, as labelme paints it
    assert prompts["ball"][0][20, [24, 25, 35, 36]].tolist() == [False, True, True, False]
    assert np.argwhere(prompts["leaf"][0]).min(0).tolist() == [6, 3]
    assert prompts["leaf"][0].sum() == 20
    assert list(read_support_files(tmp_path, ["ball"]).prompts[0]) == ["ball"]


@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        ([shape("line", [[1, 1], [2, 2]])], {}, "shape 0 is a line of 2 points"),
        ([{"label": "cat"}], {}, "is not labelme JSON .*points"),
        ([shape("point", [[1, 1]])], {"imageWidth": 61}, "is 60x40 pixels, but .* says 61x40"),
        ([shape("point", [[1, 1]])], {"imagePath": "b.png"}, "names 'b.png', which is not in"),
        ([], {}, "annotates nothing"),
    ],
)
def test_labelme_files_that_cannot_be_used_are_named(tmp_path, shapes, changes, message):
    with pytest.raises(InputError, match=message):
        read_support_files(labelme(tmp_path, shapes, **changes))


def test_a_photo_of_a_labelme_file_may_be_elsewhere_if_one_says_where(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "photos").mkdir()
    folder = labelme(tmp_path / "json", [shape("point", [[1, 1]])], imagePath="..\\photos\\a.png")
    (tmp_path / "json" / "a.png").rename(tmp_path / "photos" / "a.png")
    assert read_support_files(folder, photos=tmp_path / "photos").photos == [tmp_path / "photos" / "a.png"]
    with pytest.raises(InputError, match="--support-images"):
        read_support_files(folder)


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "link.png", "{0}/secret.png"])
def test_a_support_photo_outside_its_folder_is_not_opened(tmp_path, name):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "secret.png")
    (tmp_path / "sub" / "link.png").symlink_to(tmp_path / "secret.png")
    name = name.format(tmp_path)
    coco = {
        "images": [{"id": 1, "file_name": name, "height": 40, "width": 60}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "sub" / "coco.json").write_text(json.dumps(coco))
    with pytest.raises(InputError, match="which is not in"):
        read_support_files(tmp_path / "sub" / "coco.json", photos=tmp_path / "sub")
    folder = labelme(tmp_path / "sub", [shape("point", [[1, 1]])], imagePath=name)
    with pytest.raises(InputError, match="which is not in"):
        read_support_files(folder / "a.json")


def test_support_files_that_cannot_be_used_are_named(scenes, tmp_path):
    support = scenes / "annotations" / "support.json"
    with pytest.raises(InputError, match="is not there"):
        read_support_files(tmp_path / "none.json")
    with pytest.raises(InputError, match="Pass the photos' folder as --support-images"):
        read_support_files(support)
    with pytest.raises(InputError, match=r"^\S*support\.json names '"):
        read_support_files(support, None, tmp_path)
    with pytest.raises(InputError, match="--classes cow: "):
        read_support_files(support, ["cow"], scenes / "val2017")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="neither labelme JSON nor a COCO instances file"):
        read_support_files(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(InputError, match="is not JSON"):
        read_support_files(tmp_path / "x.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no \.json"):
        read_support_files(tmp_path / "empty")


def test_the_heads_are_timed_against_the_backbone():
    results = bench_predict(("debug", "hybrid"), "vit_demo_patch8_128", 128, ways=2, shots=2, repeats=2)
    assert ["debug" in results[0].name, "hybrid" in results[1].name] == [True, True]
    for result in results:
        assert result.ratio == pytest.approx(result.details["heads ms"] / result.details["backbone ms"])
        assert "2 ways, 4 supports" in result.name
