"""Supports in files as people annotate them: a COCO instances file, or a folder of labelme JSON."""

import base64
import binascii
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from la.data.photos import PHOTO_FORMATS, Photo
from la.errors import InputError
from la.predictor.checkpoint import Checkpoint
from la.predictor.support_set import SupportSet, load_supports
from la.predictor.user_prompts import Box, Points, Prompt

AnnotatedPhoto = tuple[Photo, dict[str, list[Prompt]]]  # with its prompts by class name
NEGATIVE = "negative"  # flag or description of a labelme point that is not on the object


@dataclass(frozen=True)
class SupportFiles:
    """Photos, the prompts of each by class name, and the ids that a COCO file gives its classes (else empty)."""

    photos: list[Photo]
    prompts: list[dict[str, list[Prompt]]]
    category_ids: dict[str, int]


def read_support_files(
    source: Path, classes: Collection[str] | None = None, photos: Path | None = None
) -> SupportFiles:
    """What `source` annotates: a COCO instances file, or a labelme JSON or a folder of them.

    `classes` leaves out all others; `photos` is the folder of the photos, by default where the file says below its
    own folder; for a COCO file also an `images` beside it, or the folder of its name in a COCO download. A name or link
    that leads out of the folder is not followed. Raises InputError, which names file and entry, for
    what cannot be read and where nothing is left.
    """
    source = Path(source)
    ids: dict[str, int] = {}
    if source.is_dir():
        read = [_of_labelme(file, _json(file), photos) for file in sorted(source.glob("*.json"))]
        if not read:
            raise InputError(f"--support {source} has no .json in it; expected labelme's, one beside each photo.")
    elif not source.is_file():
        raise InputError(f"--support {source} is not there. Pass a COCO instances file or a folder of labelme JSON.")
    elif "shapes" in (content := _json(source)):
        read = [_of_labelme(source, content, photos)]
    else:
        read, ids = _of_coco(source, content, photos)
    known = sorted({name for _, prompts in read for name in prompts})
    if missing := sorted(set(classes or ()) - set(known)):
        raise InputError(f"--classes {', '.join(missing)}: {source} annotates {', '.join(known) or 'none'}.")
    kept = [
        (photo, chosen)
        for photo, prompts in read
        if (chosen := {name: given for name, given in prompts.items() if not classes or name in classes})
    ]
    if not kept:
        raise InputError(f"--support {source} annotates nothing; expected at least one object on one photo.")
    return SupportFiles([photo for photo, _ in kept], [prompts for _, prompts in kept], ids)


def saved_classes(paths: Sequence[Path], checkpoint: Checkpoint) -> list[SupportSet]:
    """Classes that were saved before. Raises InputError for those of other features than the checkpoint takes."""
    sets = [load_supports(path) for path in paths]
    for path, one in zip(paths, sets, strict=True):
        takes = {name: (checkpoint.features or one.made_by)[name] for name in ("backbone", "image_size")}
        channels = one.supports[0].features.shape[-1]
        if channels != checkpoint.model.config.channels or any(takes[name] != one.made_by[name] for name in takes):
            raise InputError(
                f"--prototypes {path} holds features of {one.made_by['backbone']} at {one.made_by['image_size']} px, "
                f"but --checkpoint {checkpoint.name} takes those of {takes['backbone']} at {takes['image_size']} px. "
                f"Pass the checkpoint they were saved with, {one.made_by['checkpoint']}, and its --weights if it asks."
            )
    return sets


def _of_coco(file: Path, content: dict, photos: Path | None) -> tuple[list[AnnotatedPhoto], dict[str, int]]:
    try:
        categories = {int(one["id"]): str(one["name"]) for one in content["categories"]}
        images = {int(one["id"]): one for one in content["images"]}
        by_image: dict[int, dict[str, list[Prompt]]] = {number: {} for number in images}
        for one in content["annotations"]:
            if not one.get("iscrowd"):  # many objects under one mask say little of one
                name = categories[int(one["category_id"])]
                by_image[int(one["image_id"])].setdefault(name, []).append(one)
        shown = [number for number in sorted(images) if by_image[number]]
        paths = [_coco_photo(file, str(images[number]["file_name"]), photos) for number in shown]
    except InputError:  # which is a ValueError
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"--support {file} is neither labelme JSON nor a COCO instances file ({type(error).__name__}: {error}); "
            "expected `images`, `annotations` and `categories` that name one another."
        ) from error
    for number, path in zip(shown, paths, strict=True):
        _same_size(path, (images[number].get("height"), images[number].get("width")), file)
    read = [(path, by_image[number]) for number, path in zip(shown, paths, strict=True)]
    return read, {name: number for number, name in categories.items()}


def _coco_photo(file: Path, name: str, photos: Path | None) -> Path:
    split = file.stem.removeprefix("instances_")
    folders = [photos] if photos else [file.parent, file.parent / "images", file.parent.parent / split]
    for folder in folders:
        if (path := _inside(folder, name)) and path.is_file():
            return path
    raise InputError(
        f"{file} names {name!r:.200}, which is not in {' or '.join(map(str, folders))}. Pass the photos' folder as "
        "--support-images."
    )


def _inside(folder: Path, name: str) -> Path | None:
    """The file of that name below the folder; None for a name or a link that leads out of it."""
    path = folder / name
    return path if path.resolve().is_relative_to(folder.resolve()) else None


def _of_labelme(file: Path, content: dict, photos: Path | None) -> AnnotatedPhoto:
    try:
        size = int(content["imageHeight"]), int(content["imageWidth"])
        photo = _labelme_photo(file, content, photos)
        _same_size(photo, size, file)
        prompts: dict[str, list[Prompt]] = {}
        for number, shape in enumerate(content["shapes"]):
            prompts.setdefault(str(shape["label"]), []).append(_labelme_prompt(shape, size, f"{file}: shape {number}"))
    except InputError:  # which is a ValueError
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file} is not labelme JSON ({type(error).__name__}: {error}); expected `imagePath`, `imageHeight`, "
            "`imageWidth` and `shapes`. Save it anew with labelme."
        ) from error
    return photo, prompts


def _labelme_photo(file: Path, content: dict, photos: Path | None) -> Photo:
    name = str(content["imagePath"]).replace("\\", "/")
    path = _inside(photos, name.rsplit("/", 1)[-1]) if photos else _inside(file.parent, name)
    if path and path.is_file():
        return path
    if content.get("imageData"):
        try:
            return Image.open(io.BytesIO(base64.b64decode(content["imageData"])), formats=PHOTO_FORMATS)
        except (binascii.Error, OSError, Image.DecompressionBombError) as error:
            raise InputError(f"{file}: `imageData` is no photo ({error}).") from error
    raise InputError(
        f"{file} names {name!r:.200}, which is not in {photos or file.parent}, and holds no `imageData`. Pass the "
        "photos' folder as --support-images."
    )


def _labelme_prompt(shape: Mapping[str, Any], size: tuple[int, int], where: str) -> Prompt:
    kind = shape.get("shape_type") or "polygon"
    corners = [(float(x), float(y)) for x, y in shape["points"]]
    if kind == "point":
        off = (shape.get("flags") or {}).get(NEGATIVE) or shape.get("description") == NEGATIVE
        return Points((), corners) if off else Points(corners)
    if kind == "rectangle" and len(corners) == 2:
        (xs, ys) = zip(*corners, strict=True)
        return Box(min(xs), min(ys), max(xs), max(ys))
    if kind == "polygon" and len(corners) >= 3:
        return _painted(size, lambda draw: draw.polygon(corners, fill=1))
    if kind == "circle" and len(corners) == 2:
        (x, y), edge = corners
        r = math.dist((x, y), edge)
        return _painted(size, lambda draw: draw.ellipse((x - r, y - r, x + r, y + r), fill=1))
    if kind == "mask" and len(corners) == 2:
        return _pasted(shape["mask"], corners, size, where)
    raise InputError(
        f"{where} is a {kind} of {len(corners)} points; expected polygon, rectangle, circle, mask or point. Draw it so."
    )


def _painted(size: tuple[int, int], paint) -> np.ndarray:
    canvas = Image.new("L", size[::-1])
    paint(ImageDraw.Draw(canvas))
    return np.asarray(canvas) > 0


def _pasted(encoded: str, corners: list[tuple[float, float]], size: tuple[int, int], where: str) -> np.ndarray:
    """A mask that labelme keeps as a PNG of the box around it."""
    try:
        piece = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)), formats=("PNG",)).convert("L")) > 0
    except (binascii.Error, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: `mask` is no PNG ({error}). Draw it anew.") from error
    mask = np.zeros(size, bool)
    x, y = max(0, int(corners[0][0])), max(0, int(corners[0][1]))
    room = mask[y : y + piece.shape[0], x : x + piece.shape[1]]
    room |= piece[: room.shape[0], : room.shape[1]]
    return mask


def _json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON of COCO or labelme ({error!s:.120}).") from error


def _same_size(photo: Photo, expected: tuple[int | None, int | None], file: Path) -> None:
    """The photo is as large as the file says: else its prompts would lie elsewhere."""
    try:
        with Image.open(photo, formats=PHOTO_FORMATS) if isinstance(photo, Path) else photo.copy() as opened:
            turned = opened.getexif().get(0x0112, 1) >= 5  # sides change places when it is turned upright
            found = (opened.width, opened.height) if turned else (opened.height, opened.width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{photo} cannot be decoded ({error!s:.120}); {file} needs it. Save it anew.") from error
    if None not in expected and found != expected:
        raise InputError(
            f"{photo} is {found[1]}x{found[0]} pixels, but {file} says {expected[1]}x{expected[0]}. Restore the photo "
            "that was annotated, or annotate this one."
        )
