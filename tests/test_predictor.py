"""The predictor: what users show it, what it keeps, and that it segments as evaluation does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from torch.nn import functional as F

from la.data.coco import decode
from la.device import pick_device
from la.episodes.coverage import mask_coverage
from la.errors import InputError
from la.model.decoder import segment
from la.model.label_anything import build, preset, save_state
from la.predictor.checkpoint import BUNDLED_WEIGHTS, read_checkpoint
from la.predictor.encoded_supports import learn
from la.predictor.predictor import Predictor
from la.predictor.support_set import load_supports, merged
from la.predictor.user_prompts import Box, Points
from pipelines.config import EvaluateConfig, FeaturizeConfig, TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import draw, evaluation_plan
from pipelines.evaluation.methods import find_method
from pipelines.evaluation.shared_work import predictor as predictor_of_episodes
from pipelines.store.featurize import featurize
from pipelines.store.reader import FeatureStore
from pipelines.training.state import checkpoint

SIZE = (96, 128)  # height and width of a photo, pixels


@pytest.fixture(scope="module")
def demo():
    return Predictor.from_checkpoint("demo", "cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = draw_scenes(tmp_path_factory.mktemp("scenes"), train_images=80, val_images=12)
    return sorted((root / "val2017").iterdir())


@pytest.fixture(scope="module", params=["paper", "official", "hybrid"])
def fresh(request, tmp_path_factory):
    """A predictor of each kind with random weights on the demo's features."""
    torch.manual_seed(0)
    changes = {} if request.param == "hybrid" else {"dim": 32}
    model = build(preset(request.param, channels=128, **changes))
    path = tmp_path_factory.mktemp("checkpoint") / "fresh.pt"
    features = read_checkpoint("demo").features
    torch.save(save_state(model) | {"step": 1, "fold": 0, "store": None, "features": features}, path)
    return Predictor.from_checkpoint(path, "cpu")


def photo(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def square(x, y, side=40, size=SIZE):
    mask = np.zeros(size, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def mixed(predictor):
    """Two classes of one to two shots by all kinds of prompts."""
    rle = rle_tools.encode(np.asfortranarray(square(60, 30), np.uint8))
    prompts = [
        {"cat": square(10, 10), "dog": [Box(50, 20, 120, 90), Points([(60, 30)], outside=[(5, 5)])]},
        {"dog": {"segmentation": rle, "bbox": [60, 30, 40, 40]}},
    ]
    return predictor.set_support([photo(1), photo(2)], prompts)


def test_masks_come_at_each_photos_own_size_with_a_score_for_each_class(demo, scenes):
    supports = mixed(demo)
    assert supports.classes == demo.classes == ("cat", "dog")
    assert supports.shots == {"cat": 1, "dog": 2}
    masks, scores = demo.segment([scenes[0], photo(3), Image.new("L", (31, 57))])
    assert [mask.shape for mask in masks] == [(128, 128), SIZE, (57, 31)]
    for mask, score in zip(masks, scores, strict=True):
        assert mask.dtype == np.uint8
        assert mask.max() <= 2
        assert score.shape == (2,)
        assert ((score > 0) == [label in mask for label in (1, 2)]).all()
        assert (score <= 1).all()


def test_photos_of_one_call_do_not_change_one_another(fresh, scenes):
    mixed(fresh)
    together = fresh.segment(scenes[:3]).masks
    for path, mask in zip(scenes, together, strict=False):
        alone = fresh.segment([path]).masks[0]
        assert (alone != mask).mean() < 1e-3  # another batch rounds otherwise, and two classes may be even at a pixel


def test_what_is_kept_gives_the_logits_of_the_whole_model(fresh, scenes):
    """Prototypes and matched supports, computed once, against one episode through the model."""
    batch = mixed(fresh).batch()
    query = fresh.encode(scenes[:2])
    kept = learn(fresh.model, fresh.supports, torch.device("cpu")).logits(query)
    for one, logits in zip(query, kept, strict=True):
        batch.query = one[None]
        with torch.inference_mode():
            torch.testing.assert_close(fresh.model(batch)[0], logits, rtol=1e-4, atol=1e-4)


def test_saved_classes_are_used_without_their_photos(fresh, scenes, tmp_path):
    mixed(fresh)
    wanted = fresh.segment(scenes[:2])
    fresh.save_prototypes(tmp_path / "classes.safetensors")
    fresh.set_support([photo(9)], [{"other": square(0, 0)}])
    loaded = fresh.load_prototypes(tmp_path / "classes.safetensors")
    assert loaded.classes == ("cat", "dog")
    assert loaded.made_by["checkpoint_digest"] == fresh.checkpoint.digest
    for found, want in zip(fresh.segment(scenes[:2]), wanted, strict=True):
        np.testing.assert_array_equal(found, want)


def test_classes_of_several_files_are_as_if_shown_at_once(fresh, scenes, tmp_path):
    shown = ([photo(1), photo(2)], [{"cat": square(10, 10)}, {"dog": Box(50, 20, 120, 90)}])
    fresh.set_support(*shown)
    wanted = fresh.segment(scenes[:2]).masks
    for number, (image, prompts) in enumerate(zip(*shown, strict=True)):
        fresh.set_support([image], [prompts])
        fresh.save_prototypes(tmp_path / f"{number}.safetensors")
    fresh.load_prototypes(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    assert fresh.classes == ("cat", "dog")
    np.testing.assert_array_equal(fresh.segment(scenes[:2]).masks, wanted)
    both = merged([load_supports(tmp_path / "0.safetensors")] * 2)
    assert both.shots == {"cat": 2}


def test_the_order_of_classes_is_the_order_of_labels(demo):
    supports = demo.set_support([photo(1)], [{"b": square(0, 0), "a": square(50, 50)}], classes=("a", "b"))
    batch = supports.batch()
    slot = batch.pairs.slot[batch.mask_pair]
    assert slot.tolist() == [1, 2]
    covered = mask_coverage(batch, (16, 16))[batch.mask_pair]
    assert covered[0, 0, 0] == 0  # a lies below and to the right
    assert covered[1, 0, 0] == 1


def test_a_photo_is_taken_upright(demo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(photo()).save(tmp_path / "turned.jpg", exif=exif)
    demo.set_support([photo(1)], [{"cat": square(10, 10)}])
    assert demo.segment([tmp_path / "turned.jpg"]).masks[0].shape == SIZE[::-1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"cat": square(0, 0, size=(5, 5))}, r"class cat: a mask is \(5, 5\); expected .* \(96, 128\)"),
        ({"cat": np.zeros(SIZE, bool)}, "a mask has no pixel"),
        ({"cat": Points([(200, 5)])}, r"\(200, 5\), outside the photo of 128x96"),
        ({"cat": Points([], outside=[(5, 5)])}, "points beside the object alone"),
        ({"cat": Points([(float("nan"), 5)])}, r"a point is \(nan, 5\); expected \(x, y\) in pixels"),
        ({"cat": Box(50, 50, 50, 80)}, "holds nothing of the photo"),
        ({"cat": []}, "no prompt"),
        ({"cat": "mask.png"}, "a prompt is str"),
        ({"cat": {"id": 3}}, "neither `segmentation` nor `bbox`"),
        ({"cat": {"segmentation": [[1, 2, 3]]}}, "3 numbers"),
        ({"cat": {"segmentation": {"size": [9, 9], "counts": [81]}}}, "RLE is for size"),
        ({}, "expected a dictionary from class names"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(demo, prompts, message):
    with pytest.raises(InputError, match=message):
        demo.set_support([photo()], [prompts])


def test_other_mistakes_are_named(demo, fresh, tmp_path):
    with pytest.raises(InputError, match="2 support photos and prompts for 1"):
        demo.set_support([photo(), photo()], [{"cat": square(0, 0)}])
    with pytest.raises(InputError, match="call `set_support`"):
        Predictor(demo.checkpoint, demo.backbone, torch.device("cpu")).segment([photo()])
    with pytest.raises(InputError, match=r"no\.pt is not there"):
        Predictor.from_checkpoint(tmp_path / "no.pt")
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(InputError, match=r"text\.jpg cannot be decoded"):
        demo.segment([tmp_path / "text.jpg"])
    with pytest.raises(InputError, match="not a file of saved prototypes"):
        demo.load_prototypes(tmp_path / "text.jpg")
    supports = demo.set_support([photo()], [{"cat": square(0, 0)}])
    supports.made_by["image_size"] = 64
    with pytest.raises(InputError, match="image_size 64 instead of 128"):
        demo.use(supports)
    many = {f"class {n}": Points([(5, 5)]) for n in range(100)}
    if fresh.checkpoint.name.startswith("la"):
        with pytest.raises(InputError, match="at most 99"):
            fresh.set_support([photo()], [many])


def test_weights_other_than_the_checkpoints_are_refused(tiny_weights):
    with pytest.raises(InputError, match="other weights of vit_demo_patch8_128"):
        Predictor.from_checkpoint("demo", "cpu", weights=tiny_weights)


@pytest.mark.parametrize(("name", "ways", "shots"), [("demo", 1, 1), ("demo", 2, 2), ("paper", 2, 1)])
def test_real_photos_are_segmented_as_evaluation_scores_them(name, ways, shots, real_coco, tmp_path):
    """To the pixel: from photos and masks here, from the feature store there.

    Evaluation sums in another order, so where two slots tie to the last bits of a logit, either may win. Weights that
    were never trained tie in places.
    """
    folder = few_photos(real_coco, tmp_path)
    backbone = {"backbone": "vit_demo_patch8_128", "weights": BUNDLED_WEIGHTS["vit_demo_patch8_128"], "image_size": 128}
    store = FeatureStore(featurize(FeaturizeConfig(workspace=tmp_path, coco_dir=folder, **backbone)).store)
    torch.manual_seed(0)
    model = read_checkpoint("demo").model if name == "demo" else build(preset(name, channels=128, dim=64))
    torch.save(checkpoint(model, TrainConfig(workspace=tmp_path), store, 1), tmp_path / "best.pt")
    config = EvaluateConfig(
        workspace=tmp_path, checkpoint=tmp_path / "best.pt", ways=ways, shots=shots, episodes=6, classes="seen"
    )
    method, _, mask_px = find_method(config, store, pick_device("cpu"))
    predict = predictor_of_episodes(method, BatchBuilder(store, "val", mask_px), pick_device("cpu"))
    predictor = Predictor.from_checkpoint(tmp_path / "best.pt", "cpu")
    dataset = store.dataset("val")
    different = 0
    for episode in draw(evaluation_plan(config, 0), store, 0, 0, 6):
        predictor.set_support(*shown_by(episode, dataset, folder), [dataset.categories[c] for c in episode.classes])
        query = dataset.images[episode.query]
        path = folder / "val2017" / query.file_name
        np.testing.assert_array_equal(predictor.encode([path])[0].numpy(), store.read(episode.query))
        with torch.inference_mode():
            logits = predict([episode])[0]
        scored = segment(logits, (query.height, query.width)).numpy()
        assert scored.any()
        differs = predictor.segment([path]).masks[0] != scored
        different += np.count_nonzero(differs)
        best = F.interpolate(logits[None], scored.shape, mode="bilinear")[0].topk(2, 0).values
        assert (best[0] - best[1])[differs].le(1e-5).all()
    if name == "demo":
        assert different == 0


def few_photos(coco: Path, root: Path) -> Path:
    """A COCO folder of the first real photos of each split."""
    for split, count in (("train2017", 4), ("val2017", 30)):
        content = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
        images = content["images"][:count]
        ids = {image["id"] for image in images}
        kept = [a for a in content["annotations"] if a["image_id"] in ids]
        (root / "few" / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "few" / split).mkdir()
        for image in images:
            source = coco / split / image["file_name"]
            (root / "few" / split / image["file_name"]).write_bytes(source.read_bytes())
        (root / "few" / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(content | {"images": images, "annotations": kept})
        )
    return root / "few"


def shown_by(episode, dataset, folder):
    """The supports of an episode as a user would give them: photos, and each instance as a mask."""
    photos, prompts = [], [{} for _ in episode.supports]
    for image_id in episode.supports:
        photos.append(folder / "val2017" / dataset.images[image_id].file_name)
    for pair in episode.pairs:
        image = dataset.images[episode.supports[pair.support]]
        by_id = {a.id: a for a in dataset.annotations[image.id]}
        masks = [decode([by_id[one]], image.height, image.width) for one in pair.masks]
        prompts[pair.support][dataset.categories[episode.classes[pair.slot]]] = masks
    return photos, prompts
