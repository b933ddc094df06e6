"""Masks as files: PNG with a palette, overlays, COCO results."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle_tools

MOST_CLASSES = 255  # of a palette, beside the background
OPACITY = 0.5


def palette() -> np.ndarray:
    """(256, 3) uint8 RGB: PASCAL VOC's colours, black for the background; neighbours differ in their highest bits."""
    labels = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def indexed(mask: np.ndarray) -> Image.Image:
    """Mask (H, W) of labels up to 255 -> an image whose pixels are the labels and whose palette shows them."""
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette(palette().tobytes())
    return image


def overlay(photo: Image.Image, mask: np.ndarray, names: Sequence[str], opacity: float = OPACITY) -> Image.Image:
    """The photo in grey, so that colours stand out, with the mask over it and a legend of the classes there."""
    pixels = np.asarray(photo.convert("L").convert("RGB")).astype(np.float32)
    shown = mask > 0
    pixels[shown] = (1 - opacity) * pixels[shown] + opacity * palette()[mask[shown]]
    image = Image.fromarray(pixels.round().astype(np.uint8))
    _legend(image, [(int(label), names[label - 1]) for label in np.unique(mask) if label])
    return image


def shape_of(mask: np.ndarray) -> dict[str, object]:
    """(H, W) bool as the `segmentation` and `bbox` of a COCO annotation: compressed RLE, [x, y, width, height]."""
    rle = rle_tools.encode(np.asfortranarray(mask, np.uint8))
    shape = {"size": rle["size"], "counts": rle["counts"].decode()}
    return {"segmentation": shape, "bbox": rle_tools.toBbox(rle).tolist()}


def coco_file(
    photos: Iterable[tuple[str, tuple[int, int], Iterable[dict[str, object]]]], classes: Sequence[str]
) -> dict[str, list[dict]]:
    """COCO instances of (file name, (height, width), annotations) of each photo; category i + 1 is `classes[i]`."""
    images, annotations = [], []
    for image_id, (name, (height, width), marked) in enumerate(photos, 1):
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for annotation in marked:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, **annotation})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_results(mask: np.ndarray, scores: Sequence[float], category_ids: Sequence[int]) -> list[dict[str, object]]:
    """One COCO result for each class that has pixels: compressed RLE, box [x, y, width, height] and score.

    `image_id`, which COCO wants in each, is left to the caller.
    """
    return [
        {"category_id": category_ids[at], **shape_of(mask == at + 1), "score": round(float(scores[at]), 4)}
        for at in range(len(scores))
        if (mask == at + 1).any()
    ]


def _legend(image: Image.Image, shown: Sequence[tuple[int, str]]) -> None:
    size = max(10, min(image.size) // 30)  # pixels of a line
    draw = ImageDraw.Draw(image)
    colours = palette()
    for row, (label, name) in enumerate(shown):
        y = 4 + row * (size + 4)
        end = draw.textlength(name, font_size=size)
        draw.rectangle((2, y - 2, size + end + 12, y + size + 2), fill="black")
        draw.rectangle((4, y, 4 + size, y + size), fill=tuple(colours[label].tolist()))
        draw.text((size + 8, y), name, fill="white", font_size=size)
