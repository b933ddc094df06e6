"""COCO folders: images, instance annotations and class masks (paper section 5.1)."""

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from pycocotools import mask as rle_tools

from la.data.rle import BORDER, MAX_PIXELS, compress, stored_run_lengths
from la.errors import InputError

T = TypeVar("T")
VOID = -1  # category of an image's unlabelled pixels, which are IGNORED whatever the classes
IGNORED = 255  # label of pixels that count neither as a class nor as background
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Image:
    """One photo: its COCO id, its file name inside the split's folder, its height and width in pixels."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotated object, its mask as COCO run lengths over the photo's own pixels.

    `area` counts mask pixels (a crowd's too), `box` is (x0, y0, x1, y1) in pixels, `counts` the compressed RLE.
    """

    id: int
    image_id: int
    category_id: int
    is_crowd: bool
    area: int
    box: tuple[float, float, float, float]
    counts: bytes


@dataclass(frozen=True)
class Dataset:
    """The images and annotations of one split, ordered by id so that nothing depends on the order in a file."""

    split: str
    images: dict[int, Image]
    categories: dict[int, str]
    annotations: dict[int, tuple[Annotation, ...]] = field(repr=False)  # image id -> its annotations by id

    @cached_property
    def class_areas(self) -> dict[int, dict[int, int]]:
        """image id -> category id -> annotated area in pixels, crowds left out."""
        areas: dict[int, dict[int, int]] = {}
        for image_id, annotations in self.annotations.items():
            by_class: dict[int, int] = {}
            for one in annotations:
                if not one.is_crowd:
                    by_class[one.category_id] = by_class.get(one.category_id, 0) + one.area
            areas[image_id] = by_class
        return areas

    @cached_property
    def digest(self) -> str:
        """Hex digest of the images and annotations: equal where everything drawn from them is equal."""
        content = hashlib.sha256(repr(sorted(self.categories.items())).encode())
        for image_id, found in self.annotations.items():
            image = self.images[image_id]
            content.update(f"{image_id} {image.height} {image.width}".encode())
            for one in found:
                content.update(f"{one.id} {one.category_id} {one.is_crowd} {one.box}".encode() + one.counts)
        return content.hexdigest()[:16]

    def images_by_class(self, min_area: int) -> dict[int, list[int]]:
        """category id -> sorted ids of the images that show at least `min_area` pixels of it."""
        found: dict[int, list[int]] = {category: [] for category in sorted(self.categories)}
        for image_id in sorted(self.images):
            for category, area in self.class_areas.get(image_id, {}).items():
                if area >= min_area:
                    found[category].append(image_id)
        return found


def find_splits(coco_dir: Path, names: Mapping[str, str] | None = None) -> dict[str, tuple[Path, Path]]:
    """{"train": (annotation file, photo folder), "val": ...} of a folder laid out as COCO is downloaded.

    `coco_dir` is a Path, or what reads like one, such as a folder on object storage; so are the paths returned.
    `names` maps "train" and "val" to split names such as "train2014"; by default the newest year that has both an
    annotation file and a photo folder. Raises InputError where the folder or a split is missing.
    """
    if not coco_dir.is_dir():
        raise InputError(
            f"coco_dir {coco_dir.absolute() if isinstance(coco_dir, Path) else coco_dir} is not a folder. Expected "
            "annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/ and val2017/ in it. "
            "Name yours, here or in LA_COCO_DIR, or unpack train2017.zip, val2017.zip and annotations_trainval2017.zip "
            "of https://cocodataset.org/#download there. The demo needs no photos."
        )
    splits: dict[str, tuple[Path, Path]] = {}
    for role in ("train", "val"):
        named = (names or {}).get(role)
        pattern = f"instances_{named or role + '20[0-9][0-9]'}.json"
        candidates = sorted((coco_dir / "annotations").glob(pattern), reverse=True)
        for file in candidates:
            photos = coco_dir / file.stem.removeprefix("instances_")
            if photos.is_dir():
                splits[role] = (file, photos)
                break
        else:
            found = ", ".join(sorted(p.name for p in (coco_dir / "annotations").glob("*.json"))) or "no annotation file"
            folders = ", ".join(sorted(p.name for p in coco_dir.iterdir() if p.is_dir())) or "no folder"
            raise InputError(
                f"coco_dir {coco_dir} has no {role} split: expected annotations/{pattern} and a photo folder of the "
                f"same name; found {found}; folders {folders}. Name another as {role}_split."
            )
    return splits


def load_coco(file: Path, photos: Path | None, split: str) -> Dataset:
    """Read a COCO instances file; polygons become run lengths once, here. Nothing in the file is trusted.

    `photos` is the folder whose files must exist (None: not looked at). An image's `void_rle`, an RLE of pixels that
    nobody labelled (VOC's object borders), becomes an annotation of the category VOID. Outlines and boxes may reach a
    tenth of the photo's side beyond it; outlines are clipped. Raises InputError, which names the entry and its field,
    for a file that is not COCO instances JSON, entries of wrong types or sizes, ids that two entries share, an
    annotation of an unknown image or category, and a photo that is not a file of the folder.
    """
    try:
        content = json.loads(file.read_bytes())
        raw_images, raw_annotations, raw_categories = (content[f] for f in ("images", "annotations", "categories"))
        if not all(isinstance(listed, list) for listed in (raw_images, raw_annotations, raw_categories)):
            raise TypeError("`images`, `annotations` and `categories` must be lists")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file} is not a COCO instances file ({type(error).__name__}: {error!s:.120}); expected JSON with "
            "`images`, `annotations` and `categories`. Download it again or pass another coco_dir."
        ) from error
    categories = _by_id(raw_categories, "categories", _category, file)
    images = _by_id(raw_images, "images", _image, file)
    if photos is not None:
        _check_photos(images, file, photos)
    read = partial(_annotation, images=images, categories=categories)
    found = list(_by_id(raw_annotations, "annotations", read, file).values())
    for raw in raw_images:
        if raw.get("void_rle") is not None:
            image = images[int(raw["id"])]
            void = partial(_drawn, raw["void_rle"], None, image, id=-1 - image.id, category_id=VOID, is_crowd=True)
            found.append(_named(f"{file}: image {image.id}, `void_rle`", void))
    by_image: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    for one in found:
        if one.area > 0:
            by_image[one.image_id].append(one)
    return Dataset(
        split=split,
        images=dict(sorted(images.items())),
        categories={i: one.name for i, one in sorted(categories.items())},
        annotations={i: tuple(sorted(found, key=lambda a: a.id)) for i, found in sorted(by_image.items())},
    )


class _Category(NamedTuple):
    id: int
    name: str


def _by_id(raws: list, listed: str, read: Callable[[dict], T], file: Path) -> dict[int, T]:
    """id -> what `read` makes of an entry of `listed`; its ValueErrors become InputErrors that name the entry."""
    found: dict[int, T] = {}
    for place, raw in enumerate(raws):
        if not isinstance(raw, dict):
            raise InputError(f"{file}: {listed}[{place}] is {reprlib.repr(raw)}; expected an object. Remove it.")
        named = {"images": "image", "annotations": "annotation", "categories": "category"}[listed]
        where = f"{file}: {named} {raw['id']}" if type(raw.get("id")) is int else f"{file}: {listed}[{place}]"
        one = _named(where, partial(read, raw))
        if one.id in found:
            raise InputError(
                f"{where} has the same id as an entry before it; expected ids of their own, by which everything later "
                f"tells {listed} apart. Renumber one of them, or remove the copy."
            )
        found[one.id] = one
    return found


def _named(where: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except ValueError as error:
        joint = " " if str(error).startswith(("is ", "has ", "lacks ")) else ": "
        raise InputError(f"{where}{joint}{error}") from error


def _category(raw: dict) -> _Category:
    return _Category(_whole(raw, "id", most=2**31 - 1), _text(raw, "name"))


def _image(raw: dict) -> Image:
    try:
        image = Image(_whole(raw, "id"), _text(raw, "file_name"), *(_whole(raw, f, 1) for f in ("height", "width")))
    except ValueError as error:
        raise ValueError(f"lacks a usable id, file_name, height or width: {error}") from error
    check_image(image)
    return image


def check_image(image: Image) -> None:
    """Raises ValueError for a file name that may lead out of the photo folder, and for a size that no photo has."""
    if image.file_name in (".", "..") or re.search(r"[/\\]", image.file_name):
        raise ValueError(
            f"has file_name {image.file_name!r:.120}, which may lead out of the photo folder; expected the plain name "
            "of a file in it. Move the photo there and write its name without a folder."
        )
    if not 0 < image.height * image.width <= MAX_PIXELS or image.height < 0:
        raise ValueError(
            f"is said to be {image.width}x{image.height} pixels; expected at most {MAX_PIXELS} in all. Correct height "
            "and width, or scale photo and annotations down."
        )


def _check_photos(images: dict[int, Image], file: Path, photos: Path) -> None:
    """Every image is a regular file that lies in the folder, not a link that leads out of it."""
    here = isinstance(photos, Path)
    present = {entry.name: entry for entry in os.scandir(photos)} if here else photos.file_names()
    folder = photos.resolve() if here else None
    for image in images.values():
        where = f"{file}: image {image.id} names {image.file_name}, which"
        if image.file_name not in present:
            raise InputError(
                f"{where} is not in {photos}. Finish the download, or remove the image from the annotation file."
            )
        if not here:
            continue
        entry = present[image.file_name]
        if entry.is_symlink() and Path(entry.path).resolve().parent != folder:
            raise InputError(
                f"{where} is a link that leads out of {photos}. Put the photo itself or a hard link there, or link "
                "the whole folder instead."
            )
        if not entry.is_file():
            raise InputError(f"{where} is not a file but something else in {photos}. Put the photo there.")


def _annotation(raw: dict, images: dict[int, Image], categories: dict[int, _Category]) -> Annotation:
    annotation_id, image_id, category_id = (_whole(raw, f) for f in ("id", "image_id", "category_id"))
    if image_id not in images:
        raise ValueError(
            f"is of image {image_id}, which is not listed under `images`. Remove the annotation or add its image."
        )
    if category_id not in categories:
        raise ValueError(
            f"has category {category_id}, which is not listed under `categories`. Remove the annotation or add its "
            "category."
        )
    if raw.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"`iscrowd` is {reprlib.repr(raw['iscrowd'])}; expected 0 or 1. Fix it.")
    of = {"id": annotation_id, "category_id": category_id, "is_crowd": bool(raw.get("iscrowd", 0))}
    return _drawn(raw.get("segmentation"), raw.get("bbox") or None, images[image_id], **of)


def _drawn(shape: object, bbox: object, image: Image, **of) -> Annotation:
    counts = compress(shape, image.height, image.width)
    rle = {"size": [image.height, image.width], "counts": counts}
    x, y, w, h = _box(bbox, image) if bbox is not None else map(float, rle_tools.toBbox(rle))
    return Annotation(image_id=image.id, area=int(rle_tools.area(rle)), box=(x, y, x + w, y + h), counts=counts, **of)


def _box(bbox: object, image: Image) -> tuple[float, float, float, float]:
    told = f"bbox {reprlib.repr(bbox)}"
    try:
        x, y, w, h = (float(v) for v in bbox if type(v) in (int, float))
        sound = len(bbox) == 4 and all(map(math.isfinite, (x, y, w, h))) and w >= 0 and h >= 0
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise ValueError(f"{told} is not [x, y, width, height] in pixels, all finite, none below 0. Fix or remove it.")
    for start, side, whole in ((x, w, image.width), (y, h, image.height)):
        if start < -BORDER * whole or start + side > (1 + BORDER) * whole or start + side < 0 or start > whole:
            raise ValueError(
                f"{told} lies outside the photo of {image.width}x{image.height} pixels; expected it inside, or up to a "
                "tenth of the side beyond. If it is of a photo of another size, scale it; else fix or remove it."
            )
    return x, y, w, h


def _whole(raw: dict, name: str, least: int = 0, most: int = 2**63 - 1) -> int:
    value = raw.get(name)
    if isinstance(value, float) and value.is_integer():  # as tables written by other tools have them
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"`{name}` is {_shown(raw, name)}; expected a whole number "
            f"from {least} to {most}. Fix the entry or remove it."
        )
    return value


def _text(raw: dict, name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not value or _UNPRINTABLE.search(value):
        raise ValueError(
            f"`{name}` is {_shown(raw, name)}; expected text without control characters. Fix or remove the entry."
        )
    return value


def _shown(raw: dict, name: str) -> str:
    return reprlib.repr(raw[name]) if name in raw else "missing"


def decode(annotations: Iterable[Annotation], height: int, width: int) -> np.ndarray:
    """(height, width) uint8 union of the masks of `annotations`; zeros where there are none.

    Raises InputError for an annotation that is not of a photo of this size, as `runs_of` does.
    """
    annotations = list(annotations)
    for one in annotations:
        runs_of(one, height, width)  # pycocotools trusts them
    rles = [{"size": [height, width], "counts": one.counts} for one in annotations]
    if not rles:
        return np.zeros((height, width), np.uint8)
    return rle_tools.decode(rle_tools.merge(rles) if len(rles) > 1 else rles[0])


def runs_of(annotation: Annotation, height: int, width: int) -> list[int]:
    """Run lengths (background first, column-major) of an annotation on a photo of this size.

    Raises InputError where they do not cover it or are not of its area: a store, too, may come from anywhere.
    """
    try:
        runs = stored_run_lengths(annotation.counts, height, width)
        if sum(runs[1::2]) != annotation.area:
            raise ValueError(f"its mask has {sum(runs[1::2])} pixels, but its `area` is {annotation.area}.")
    except ValueError as error:
        raise InputError(
            f"annotation {annotation.id} of image {annotation.image_id} is damaged: {error} Remove the store's "
            "annotations-*.parquet and store.json, then run `featurize` again."
        ) from error
    return runs


def label_map(dataset: Dataset, image_id: int, classes: Iterable[int]) -> np.ndarray:
    """(height, width) uint8 ground truth at the photo's own size: 0 background, i + 1 the i-th of `classes`.

    Crowds of these classes and unlabelled pixels are IGNORED where no single object covers them; where objects overlap
    the smaller one, drawn last, wins, so that no object vanishes under a larger one.
    """
    image = dataset.images[image_id]
    labels = np.zeros((image.height, image.width), np.uint8)
    for one, label in drawing_order(dataset.annotations[image_id], classes):
        labels[decode([one], image.height, image.width) > 0] = label
    return labels


def drawing_order(annotations: Iterable[Annotation], classes: Iterable[int]) -> list[tuple[Annotation, int]]:
    """The annotations that a label map of `classes` shows and their labels, those drawn over others last."""
    labels = {category: slot for slot, category in enumerate(classes, start=1)} | {VOID: IGNORED}
    shown = [a for a in annotations if a.category_id in labels]
    shown.sort(key=lambda a: (not a.is_crowd, -a.area, a.id))
    return [(a, IGNORED if a.is_crowd else labels[a.category_id]) for a in shown]
