"""The web page in a browser: marks on a support, a query, and a mask that is the predictor's to the pixel."""

import json
import os
import re
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from page_driver import Marker, add_class, files_of, opened, overlay, saved, served, upload
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

from la.predictor.predictor import Predictor
from la.predictor.user_prompts import Box, Points

pytest.importorskip("nicegui")
FIRST, SECOND = "wavy disc", "star & <b>"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("serve") / "log", "--max-photos", "3") as (address, _):
        yield address


def test_marks_of_every_tool_give_the_predictors_mask_to_the_pixel(address, tmp_path):
    support, query = files_of(tmp_path, 27, 102)
    with opened(address) as page:
        add_class(page, FIRST)
        add_class(page, SECOND)
        upload(page, "Add support photos", support)
        page.get_by_role("button", name="Mark photo 27.png").wait_for()
        marker = Marker(page)

        page.get_by_role("button", name=FIRST, exact=True).click()
        marker.click(60, 50)
        marker.click(300, 20, button="right")
        page.get_by_role("button", name="Box", exact=True).click()
        marker.drag((200, 60), (40, 180))
        page.get_by_role("button", name=SECOND, exact=True).click()
        page.get_by_role("button", name="Brush", exact=True).click()
        marker.drag((220, 140), (260, 160), (250, 200))
        marker.drag((10, 10), (30, 30))
        page.get_by_role("button", name="Undo").click()
        marker.drag((40, 220), (80, 220))
        marker.drag((30, 220), (90, 220), button="right")

        upload(page, "Add photos to segment", query)
        page.get_by_role("img", name="photo 102.png", exact=True).wait_for()
        page.get_by_role("button", name="Segment", exact=True).click()
        page.locator("img.mask").wait_for()
        page.get_by_text("Without this support").wait_for()
        assert page.get_by_text(re.compile(r"\d\.\d\d s, after \d+\.\d\d s in the queue")).count() == 1
        shown = overlay(page)
        support_file = json.loads(saved(page, "Marks as COCO", tmp_path).read_text())
        masks_file = saved(page, "COCO JSON", tmp_path)
        png = np.asarray(Image.open(saved(page, "Download the mask of photo 102.png as PNG", tmp_path)))

    marks = {at: [one for one in support_file["annotations"] if one["category_id"] == at] for at in (1, 2)}
    box, points = marks[1]
    (stroke,) = marks[2]
    assert [c["name"] for c in support_file["categories"]] == [FIRST, SECOND]
    np.testing.assert_allclose(box["bbox"], [40, 60, 160, 120], atol=1)
    np.testing.assert_allclose(points["points"], [[60, 50, 1], [300, 20, 0]], atol=1)
    painted = rle_tools.decode(stroke["segmentation"])
    assert all(painted[y, x] for x, y in ((220, 140), (240, 150), (260, 160), (250, 200)))
    assert not painted[:100].any(), "the second stroke was undone"
    assert painted[:, :120].sum() < 100, "the third was rubbed out, but for its edge"
    assert painted.sum() == pytest.approx(85 * 0.06 * 320, rel=0.35), "85 px of a brush 6 % of the photo wide"

    predictor = Predictor.from_checkpoint("demo", "cpu")
    x, y, w, h = box["bbox"]
    (inside, outside) = points["points"]
    prompts = {FIRST: [Box(x, y, x + w, y + h), Points([inside[:2]], [outside[:2]])], SECOND: painted}
    expected = predictor.segment([query], predictor.learn(predictor.read_supports([support], [prompts]))).masks[0]
    assert set(np.unique(expected)) > {0}
    np.testing.assert_array_equal(png, expected)

    colours = np.array([[0, 0, 0, 0], [0xE6, 0x9F, 0x00, 255], [0x56, 0xB4, 0xE9, 255]])
    np.testing.assert_array_equal(np.where(shown[..., 3:] > 0, shown, 0), colours[expected])

    coco = COCO(str(masks_file))
    (image,) = coco.loadImgs(coco.getImgIds())
    assert (image["file_name"], image["height"], image["width"]) == ("photo 102.png", 240, 320)
    found = np.zeros_like(expected)
    for one in coco.loadAnns(coco.getAnnIds()):
        found[coco.annToMask(one) == 1] = one["category_id"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("width", [1280, 400])
def test_the_example_is_one_click_away_and_fits_the_screen(address, width):
    with opened(address, width) as page:
        page.get_by_role("button", name="Show an example").click()
        page.locator("img.mask").wait_for()
        page.get_by_text("Without this support").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = overlay(page)
        assert len(np.unique(shown[shown[..., 3] > 0], axis=0)) == 2, "both classes are found"
        if folder := os.environ.get("LA_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/page-{width}.png", full_page=True)


def test_the_page_is_used_by_keyboard_alone(address, tmp_path):
    support, query = files_of(tmp_path, 27, 102)
    with opened(address) as page:
        for name in ("Add support photos", "Add photos to segment"):
            page.locator(f'a[aria-label="{name}"][tabindex="0"]').wait_for()
        page.get_by_label("Name of a class").focus()
        page.keyboard.type("thing")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="thing", exact=True).wait_for()
        upload(page, "Add support photos", support)
        canvas = page.get_by_role("application")
        canvas.focus()
        page.keyboard.press("x")
        for key in ("Enter", *["ArrowRight"] * 5, *["ArrowDown"] * 4, "Enter"):
            page.keyboard.press(key)
        page.locator(".canvas svg title").first.wait_for(state="attached")
        upload(page, "Add photos to segment", query)
        page.get_by_role("img", name="photo 102.png", exact=True).wait_for()
        page.keyboard.press("s")
        page.locator("img.mask").wait_for()
        page.wait_for_timeout(300)
        (box,) = json.loads(saved(page, "Marks as COCO", tmp_path).read_text())["annotations"]
        np.testing.assert_allclose(box["bbox"], [160, 120, 32, 25.6], atol=0.1)


def test_photos_that_are_none_are_told_and_the_page_goes_on(address, tmp_path):
    good = files_of(tmp_path, 1, 2, 3, 4)
    text, drawing = tmp_path / "text.jpg", tmp_path / "drawing.png"
    text.write_text("this is text")
    drawing.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    with opened(address) as page:
        for bad in (text, drawing):
            upload(page, "Add support photos", bad)
            page.get_by_text(f"{bad.name} is not a photo").wait_for()
        for at, path in enumerate(good[:3]):
            upload(page, "Add support photos", path)
            page.get_by_role("button", name=f"Mark photo {at + 1}.png").wait_for()
        upload(page, "Add support photos", good[3])
        page.get_by_text("There are 3 photos, the most that are taken.").wait_for()
        page.get_by_role("button", name="Remove photo").click()
        page.get_by_role("button", name="Mark photo 3.png").wait_for(state="detached")
        upload(page, "Add support photos", good[3])
        page.get_by_role("button", name="Mark photo 4.png").wait_for()
        page.get_by_role("button", name="Segment", exact=True).click()
        page.get_by_text("Nothing is marked yet").wait_for()


def test_two_pages_do_not_see_each_other(address):
    with opened(address) as one, opened_beside(one, address) as other:
        add_class(one, "mine")
        add_class(other, "yours")
        assert one.get_by_role("button", name="yours", exact=True).count() == 0
        assert other.get_by_role("button", name="mine", exact=True).count() == 0


@contextmanager
def opened_beside(page, address: str):
    """Another page of the same browser."""
    other = page.context.browser.new_page()
    other.goto(address)
    yield other
    other.close()


def test_another_sites_name_for_this_machine_is_refused(address):
    """Else a page of that site could read what this one holds (DNS rebinding)."""
    request = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=20)
    assert urllib.request.urlopen(f"{address}/api/openapi.json", timeout=20).status == 200
