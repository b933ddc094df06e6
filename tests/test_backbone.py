"""The frozen ViT and the photos it is given."""

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from la.backbone.vit import identify_weights, load_backbone, preprocessing
from la.data.photos import read_photo
from la.errors import InputError
from tests.conftest import TINY

NAME, SIZE = TINY["backbone"], TINY["image_size"]


@pytest.fixture(scope="module")
def backbone(tiny_weights):
    return load_backbone(NAME, SIZE, tiny_weights)


def photos(count=2, size=SIZE):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.manual_seed(0), dtype=torch.uint8)


def test_it_gives_patch_tokens_after_the_final_norm(tiny_weights):
    native = load_backbone(NAME, 128, tiny_weights)
    vit = timm.create_model(NAME, num_classes=0).eval()
    vit.load_state_dict(safetensors.torch.load_file(tiny_weights))
    batch = native.normalise(photos(size=128))
    with torch.no_grad():
        expected = vit.forward_features(batch)[:, 1:].reshape(2, 16, 16, 128)
        assert torch.equal(native(batch), expected)


def test_attributes_say_what_was_loaded(backbone):
    assert (backbone.name, backbone.image_size, backbone.patch_size) == (NAME, SIZE, 8)
    assert (backbone.grid, backbone.channels) == ((8, 8), 128)
    assert backbone.preprocessing == preprocessing(NAME)
    assert backbone.preprocessing["mean"] == [0.5, 0.5, 0.5]


def test_photos_are_normalised_to_the_models_mean_and_std(backbone):
    white = torch.full((1, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    assert torch.allclose(backbone.normalise(white), torch.ones(1))
    assert torch.allclose(backbone.normalise(white * 0), -torch.ones(1))


def test_encoding_is_the_forward_pass_in_half_precision(backbone):
    batch = photos()
    features = backbone.encode(batch)
    assert features.shape == (2, 8, 8, 128)
    assert features.dtype == torch.float16
    with torch.no_grad():
        assert torch.equal(features, backbone(backbone.normalise(batch)).half())


def test_it_stays_frozen_and_in_evaluation_mode(backbone):
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_register_tokens_are_left_out(tmp_path):
    name, path = "vit_small_patch14_reg4_dinov2", tmp_path / "reg.safetensors"
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model(name, num_classes=0, img_size=56, depth=2).state_dict(), path)
    with pytest.raises(InputError, match="missing"):  # only two of the twelve blocks
        load_backbone(name, 56, path)
    safetensors.torch.save_file(timm.create_model(name, num_classes=0, img_size=56).state_dict(), path)
    assert load_backbone(name, 56, path).encode(photos(1, 56)).shape == (1, 4, 4, 384)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_torch_files_are_unwrapped_and_a_classifier_is_ignored(tiny_weights, tmp_path, wrapper):
    state = safetensors.torch.load_file(tiny_weights)
    state |= {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "w.pth")
    digest = load_backbone(NAME, SIZE, tiny_weights).weights_digest
    assert load_backbone(NAME, SIZE, tmp_path / "w.pth").weights_digest == digest


def test_the_weights_digest_ignores_order_and_sees_values(tiny_weights, tmp_path):
    state = safetensors.torch.load_file(tiny_weights)
    digest = load_backbone(NAME, SIZE, tiny_weights).weights_digest
    torch.save(dict(reversed(state.items())), tmp_path / "reversed.pth")
    assert load_backbone(NAME, SIZE, tmp_path / "reversed.pth").weights_digest == digest
    state["norm.bias"][0] += 1
    torch.save(state, tmp_path / "changed.pth")
    assert load_backbone(NAME, SIZE, tmp_path / "changed.pth").weights_digest != digest


def test_half_precision_position_embeddings_are_resized_in_full_precision(tiny_weights, tmp_path):
    half = {k: v.half() for k, v in safetensors.torch.load_file(tiny_weights).items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    safetensors.torch.save_file({k: v.float() for k, v in half.items()}, tmp_path / "full.safetensors")
    digests = {load_backbone(NAME, SIZE, tmp_path / f"{n}.safetensors").weights_digest for n in ("half", "full")}
    assert len(digests) == 1


def test_a_name_timm_does_not_know_is_refused():
    with pytest.raises(InputError, match=r"backbone vit_bsae_patch16_224 is not a model.*Near it: vit_b"):
        load_backbone("vit_bsae_patch16_224", 224)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_a_model_that_is_no_plain_vit_is_refused(name):
    with pytest.raises(InputError, match=f"backbone {name} is not a plain ViT"):
        load_backbone(name, 224)


def test_a_size_the_patch_does_not_divide_is_refused_with_the_nearest(tiny_weights):
    with pytest.raises(InputError, match=r"image_size 100 is not a multiple of 8.*Pass 96 or 104"):
        load_backbone(NAME, 100, tiny_weights)


def test_weights_that_do_not_fit_are_refused_by_name(tiny_weights, tmp_path):
    state = safetensors.torch.load_file(tiny_weights)
    del state["norm.weight"]
    state["norm.bias"] = torch.zeros(3)
    state["adapter.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        load_backbone(NAME, SIZE, tmp_path / "w.pth")
    for part in (
        "w.pth",
        "1 missing",
        "norm.weight",
        "1 unexpected",
        "adapter.weight",
        "norm.bias (3,) instead of (128",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_weights_file_that_cannot_be_read_is_refused(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    for content in (None, b"", b"not weights at all"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=f"weights {path}"):
            load_backbone(NAME, SIZE, path)


def test_weights_that_run_code_are_refused(tmp_path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="expected tensors alone"):
        load_backbone(NAME, SIZE, tmp_path / "w.pth")


def test_without_a_hub_the_error_says_what_to_pass(monkeypatch):
    create = timm.create_model

    def offline(*arguments, pretrained=False, **others):
        if pretrained:
            raise OSError("no route to host")
        return create(*arguments, **others)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"timm wants timm/vit_tiny_patch16_224\.augreg_in21k_ft_in1k.*as weights a"):
        load_backbone("vit_tiny_patch16_224", 224)


def test_weights_are_told_apart_without_loading_them(tiny_weights, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(tiny_weights.read_bytes())
    assert identify_weights(NAME, copy) == identify_weights(NAME, tiny_weights)
    assert identify_weights("vit_base_patch16_224.mae", None) == "hub:timm/vit_base_patch16_224.mae"
    with pytest.raises(InputError, match=r"none\.pth cannot be read"):
        identify_weights(NAME, tmp_path / "none.pth")


def test_a_photo_is_squashed_and_a_grey_one_becomes_rgb(tmp_path):
    colour = np.zeros((20, 40, 3), np.uint8)
    colour[:, :20, 0] = 255
    Image.fromarray(colour).save(tmp_path / "c.png")
    photo = read_photo(tmp_path / "c.png", 16)
    assert photo.shape == (3, 16, 16)
    assert photo.dtype == torch.uint8
    assert (photo[0, :, 0] == 255).all()
    assert (photo[:, :, -1] == 0).all()
    Image.fromarray(colour[..., 0]).save(tmp_path / "g.png")
    grey = read_photo(tmp_path / "g.png", 16)
    assert torch.equal(grey[0], grey[2])
    assert torch.equal(grey[0], photo[0])


@pytest.mark.parametrize("damage", ["truncated", "text", "missing"])
def test_a_photo_that_cannot_be_decoded_is_named(tmp_path, damage):
    path = tmp_path / "photo.jpg"
    if damage == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "text":
        path.write_text("<html>404</html>")
    with pytest.raises(InputError, match=f"{path} cannot be decoded"):
        read_photo(path, 16)


def test_a_photo_of_another_size_than_expected_is_refused(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "p.png")
    read_photo(tmp_path / "p.png", 16, (20, 40))
    with pytest.raises(InputError, match="is 40x20 pixels, but the annotations say 20x40"):
        read_photo(tmp_path / "p.png", 16, (40, 20))


def test_real_weights_give_the_features_timms_own_loader_gives(real_weights, real_coco):
    name = "vit_small_patch14_dinov2"
    backbone = load_backbone(name, 112, real_weights)
    reference = timm.create_model(
        name, num_classes=0, img_size=112, pretrained=True, pretrained_cfg_overlay={"file": str(real_weights)}
    ).eval()
    files = sorted((real_coco / "val2017").glob("*.jpg"))[:3]
    batch = backbone.normalise(torch.stack([read_photo(file, 112) for file in files]))
    with torch.no_grad():
        expected = reference.forward_features(batch)[:, 1:].unflatten(1, (8, 8))
        # timm resizes a position embedding stored in half precision in half precision
        assert torch.allclose(backbone(batch), expected, atol=0.02)
