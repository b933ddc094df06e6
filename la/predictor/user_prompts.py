"""Prompts as users give them, in pixels of their photo: masks, points, boxes and COCO annotations, in any mixture."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools

from la.data.rle import compress
from la.errors import InputError


class Points(NamedTuple):
    """Points (x, y) on the object, and points that are not on it."""

    inside: Sequence[tuple[float, float]]
    outside: Sequence[tuple[float, float]] = ()


class Box(NamedTuple):
    """Corners of a box around the object: left, top, right, bottom."""

    x0: float
    y0: float
    x1: float
    y1: float


# An array is a mask (H, W), of bool or of numbers that are 0 outside. A mapping is a COCO annotation: its
# `segmentation`, or its `bbox` [x, y, width, height] where it has none, and `points` [[x, y, label], ...], label 1 on
# the object and 0 beside it, which COCO itself does not know.
Prompt = np.ndarray | Points | Box | Mapping[str, Any]


class ClassPrompts(NamedTuple):
    """Of one class on one photo, checked: masks (H, W) bool, points (x, y, label), boxes (x0, y0, x1, y1)."""

    masks: tuple[np.ndarray, ...]
    points: tuple[tuple[float, float, int], ...]
    boxes: tuple[tuple[float, float, float, float], ...]


def check_prompts(prompts: Prompt | Iterable[Prompt], height: int, width: int, where: str) -> ClassPrompts:
    """The prompts of one class on one photo of that size; `where` names both in messages.

    Raises InputError for a mask of another size or without a pixel, a point or box outside the photo, an annotation
    without a shape, and where nothing says what is on the object.
    """
    masks: list[np.ndarray] = []
    points: list[tuple[float, float, int]] = []
    boxes: list[tuple[float, float, float, float]] = []
    single = isinstance(prompts, np.ndarray | Points | Box | Mapping)
    try:
        for prompt in [prompts] if single else prompts:
            for part in _parts(prompt, height, width) if isinstance(prompt, Mapping) else [prompt]:
                if isinstance(part, np.ndarray):
                    masks.append(_mask(part, height, width))
                elif isinstance(part, Points):
                    points += [_point(point, 1, height, width) for point in part.inside]
                    points += [_point(point, 0, height, width) for point in part.outside]
                elif isinstance(part, Box):
                    boxes.append(_box(part, height, width))
                else:
                    expected = "a mask array, Points, a Box or a COCO annotation"
                    raise ValueError(f"a prompt is {type(part).__name__}; expected {expected}.")
        if not masks and not boxes and not any(label for _, _, label in points):
            given = "points beside the object alone" if points else "no prompt"
            raise ValueError(f"{given}; expected at least one mask, box or point on the object.")
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    return ClassPrompts(tuple(masks), tuple(points), tuple(boxes))


def coverage(masks: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Masks (H, W) -> (*size) uint8: the share of each cell that they cover, 255 = all.

    Each is drawn by itself, as the masks of a data set are.
    """
    images = [Image.fromarray(mask.astype(np.uint8) * np.uint8(255)) for mask in masks]
    drawn = sum(np.asarray(image.resize(size[::-1], Image.Resampling.BOX), np.uint32) for image in images)
    return np.minimum(drawn, 255).astype(np.uint8)


def _mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    if mask.shape != (height, width):
        raise ValueError(f"a mask is {mask.shape}; expected the photo's (height, width), {(height, width)}.")
    if not mask.any():
        raise ValueError("a mask has no pixel; mark some, or leave it out.")
    return mask != 0


def _numbers(values: Any, count: int, what: str, expected: str) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, values))
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is {values!r:.60}; expected {expected} in pixels.") from error
    return numbers


def _point(point: Any, label: int, height: int, width: int) -> tuple[float, float, int]:
    x, y = _numbers(point, 2, "a point", "(x, y)")
    if not (0 <= x <= width and 0 <= y <= height):
        raise ValueError(f"a point is ({x:g}, {y:g}), outside the photo of {width}x{height} pixels.")
    return x, y, label


def _box(box: Any, height: int, width: int) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = _numbers(box, 4, "a box", "left, top, right, bottom")
    cut = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise ValueError(
            f"a box is ({x0:g}, {y0:g}, {x1:g}, {y1:g}), which holds nothing of the photo of {width}x{height} pixels; "
            "expected left < right and top < bottom."
        )
    return cut


def _parts(raw: Mapping[str, Any], height: int, width: int) -> list[np.ndarray | Points | Box]:
    """What a COCO annotation says: its mask or its box, and each of its points."""
    try:
        points = [Points([p], ()) if int(label) > 0 else Points((), [p]) for *p, label in raw.get("points") or ()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"`points` of an annotation are not [[x, y, label], ...] ({error}).") from error
    shape, box = raw.get("segmentation"), raw.get("bbox")
    if shape:
        if isinstance(shape, Mapping) and isinstance(shape.get("counts"), bytes):  # as pycocotools' `encode` gives it
            shape = {**shape, "counts": shape["counts"].decode("latin-1")}
        return [rle_tools.decode({"size": [height, width], "counts": compress(shape, height, width)}), *points]
    if box:
        x, y, w, h = _numbers(box, 4, "bbox", "[x, y, width, height]")
        return [Box(x, y, x + w, y + h), *points]
    if not points:
        raise ValueError("an annotation has neither `segmentation` nor `bbox` nor `points`.")
    return points
