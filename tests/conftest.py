"""Small inputs made by code: a COCO folder of noise photos and weights of a small ViT."""

import atexit
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a test's own cluster needs no token

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from pycocotools import mask as rle_tools

import la.backbone.vit_demo  # noqa: F401  registers the ViT of `tiny_weights`

SHARED = Path(__file__).parents[1].parent / "shared"
TINY = {"backbone": "vit_demo_patch8_128", "image_size": 64}  # 8x8 tokens of 128 channels
GREY, EMPTY, CROWDED = 3, 4, 5  # numbers of the photos of each split that are so
PERSON, DOG = 1, 18
EXIT_STATUS = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave at once: threads of Ray's and torch's libraries can outlive what they use as the interpreter is taken down.

    The commands of the product, which tests run as processes, end by themselves.
    """
    if EXIT_STATUS in config.stash:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


@contextmanager
def browser_page(width: int):
    """(a page of a headless Chromium of that width, what its console and scripts complain of)."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    complaints: list[str] = []
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page, complaints
        browser.close()


@pytest.fixture
def tiny_coco(tmp_path: Path) -> Path:
    """A COCO folder: 20 train and 6 val photos of 64x48, polygons; one grey, one unannotated, one with a crowd."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count, first_id in (("train2017", 20, 100), ("val2017", 6, 200)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            pixels = generator.integers(0, 256, (48, 64, 3), np.uint8)
            name = f"{first_id + number:012d}.jpg"
            Image.fromarray(pixels[..., 0] if number == GREY else pixels).save(root / split / name)
            images.append({"id": first_id + number, "file_name": name, "height": 48, "width": 64})
            if number == EMPTY:
                continue
            x, y, side = 2.5 + number, 3.0, 20.0
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            shape = {"segmentation": [corners], "bbox": [x, y, side, side], "category_id": (PERSON, DOG)[number % 2]}
            annotations.append(shape | {"id": 10 * (first_id + number), "image_id": first_id + number, "iscrowd": 0})
            if number == CROWDED:
                annotations.append(crowd(10 * (first_id + number) + 1, first_id + number))
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": PERSON, "name": "person"}, {"id": DOG, "name": "dog"}],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def crowd(annotation_id: int, image_id: int) -> dict:
    """A crowd of persons over the lower half, as uncompressed run lengths, which is how COCO writes crowds."""
    mask = np.zeros((48, 64), np.uint8)
    mask[24:] = 1
    runs = [24] * (2 * 64)  # column by column: 24 rows off, 24 on
    assert rle_tools.area(rle_tools.frPyObjects({"size": [48, 64], "counts": runs}, 48, 64)) == mask.sum()
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": PERSON,
        "iscrowd": 1,
        "segmentation": {"size": [48, 64], "counts": runs},
        "bbox": [0, 24, 64, 24],
    }


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the backbone named in TINY, as a safetensors file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(timm.create_model(TINY["backbone"]).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def real_coco() -> Path:
    if not (SHARED / "coco" / "annotations").is_dir():
        pytest.skip(f"no real COCO photos at {SHARED / 'coco'}")
    return SHARED / "coco"


@pytest.fixture(scope="session")
def real_weights() -> Path:
    path = SHARED / "weights" / "vit_small_patch14_dinov2.safetensors"
    if not path.exists():
        pytest.skip(f"no real ViT weights at {path}")
    return path
