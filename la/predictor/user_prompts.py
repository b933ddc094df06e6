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
ACCEPTED_PROMPTS = "a mask array, Points, a Box or a COCO annotation"


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
    for prompt in [prompts] if single else prompts:
        if isinstance(prompt, np.ndarray):
            masks.append(_mask(prompt, height, width, where))
        elif isinstance(prompt, Points):
            points += [_point(p, 1, height, width, where) for p in prompt.inside]
            points += [_point(p, 0, height, width, where) for p in prompt.outside]
        elif isinstance(prompt, Box):
            boxes.append(_box(prompt, height, width, where))
        elif isinstance(prompt, Mapping):
            drawn, pointed, boxed = _of_annotation(prompt, height, width, where)
            masks += drawn
            points += pointed
            boxes += boxed
        else:
            raise InputError(f"{where}: a prompt is {type(prompt).__name__}; expected {ACCEPTED_PROMPTS}.")
    if not masks and not boxes and not any(label for _, _, label in points):
        found = "points beside the object alone" if points else "no prompt"
        raise InputError(f"{where}: {found}; expected at least one mask, box or point on the object.")
    return ClassPrompts(tuple(masks), tuple(points), tuple(boxes))


def coverage(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mask (H, W) -> (*size) uint8: the share of each cell that it covers, 255 = all."""
    full = mask.astype(np.uint8) * np.uint8(255)
    return np.asarray(Image.fromarray(full).resize(size[::-1], Image.Resampling.BOX))


def _mask(mask: np.ndarray, height: int, width: int, where: str) -> np.ndarray:
    if mask.shape != (height, width):
        raise InputError(f"{where}: a mask is {mask.shape}; expected the photo's (height, width), {(height, width)}.")
    if not mask.any():
        raise InputError(f"{where}: a mask has no pixel; mark some, or leave it out.")
    return mask != 0


def _point(point: Any, label: int, height: int, width: int, where: str) -> tuple[float, float, int]:
    try:
        x, y = map(float, point)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: a point is {point!r:.60}; expected (x, y) in pixels.") from error
    if not (0 <= x <= width and 0 <= y <= height):
        raise InputError(f"{where}: a point is ({x:g}, {y:g}), outside the photo of {width}x{height} pixels.")
    return x, y, label


def _box(box: Any, height: int, width: int, where: str) -> tuple[float, float, float, float]:
    try:
        x0, y0, x1, y1 = map(float, box)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: a box is {box!r:.60}; expected left, top, right, bottom in pixels.") from error
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise InputError(f"{where}: a box is ({x0:g}, {y0:g}, {x1:g}, {y1:g}); expected numbers in pixels.")
    cut = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise InputError(
            f"{where}: a box is ({x0:g}, {y0:g}, {x1:g}, {y1:g}), which holds nothing of the photo of {width}x{height} "
            "pixels; expected left < right and top < bottom."
        )
    return cut


def _of_annotation(raw: Mapping[str, Any], height: int, width: int, where: str) -> tuple[list, list, list]:
    try:
        points = [(float(x), float(y), int(label)) for x, y, label in raw.get("points") or ()]
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: `points` of an annotation are not [[x, y, label], ...] ({error}).") from error
    points = [_point((x, y), int(label > 0), height, width, where) for x, y, label in points]
    shape, box = raw.get("segmentation"), raw.get("bbox")
    if shape:
        if isinstance(shape, Mapping) and isinstance(shape.get("counts"), bytes):  # as pycocotools' `encode` gives it
            shape = {**shape, "counts": shape["counts"].decode("latin-1")}
        try:
            mask = rle_tools.decode({"size": [height, width], "counts": compress(shape, height, width)})
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        return [_mask(mask, height, width, where)], points, []
    if box:
        try:
            x, y, w, h = map(float, box)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: bbox {box!r:.60} is not [x, y, width, height] in pixels.") from error
        return [], points, [_box((x, y, x + w, y + h), height, width, where)]
    if not points:
        raise InputError(f"{where}: an annotation has neither `segmentation` nor `bbox` nor `points`.")
    return [], points, []
