"""COCO folders: images, instance annotations and class masks (paper section 5.1)."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

from la.errors import InputError

VOID = -1  # category of an image's unlabelled pixels, which are IGNORED whatever the classes
IGNORED = 255  # label of pixels that count neither as a class nor as background


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

    `names` maps "train" and "val" to split names such as "train2014"; by default the newest year that has both an
    annotation file and a photo folder. Raises InputError where the folder or a split is missing.
    """
    coco_dir = Path(coco_dir)
    if not coco_dir.is_dir():
        raise InputError(
            f"--coco-dir {coco_dir} is not a folder. Expected annotations/instances_train2017.json, "
            "annotations/instances_val2017.json, train2017/ and val2017/ in it, as COCO is downloaded."
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
            found = ", ".join(sorted(p.name for p in coco_dir.glob("annotations/*.json"))) or "no annotation file"
            folders = ", ".join(sorted(p.name for p in coco_dir.iterdir() if p.is_dir())) or "no folder"
            raise InputError(
                f"--coco-dir {coco_dir} has no {role} split: expected annotations/{pattern} and a photo folder of the "
                f"same name; found {found}; folders {folders}. Name another split with --{role}-split."
            )
    return splits


def load_coco(file: Path, photos: Path | None, split: str) -> Dataset:
    """Read a COCO instances file; polygons become run lengths once, here.

    `photos` is the folder whose files must exist (None: not looked at). An image's `void_rle`, an RLE of pixels that
    nobody labelled (VOC's object borders), becomes an annotation of the category VOID. Raises InputError for a file
    that is not COCO instances JSON, an annotation of an unknown image or category, or an image that is not in the
    folder.
    """
    try:
        content = json.loads(Path(file).read_text())
        raw_images, raw_annotations = content["images"], content["annotations"]
        categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not a COCO instances file ({type(error).__name__}: {error}); expected JSON with `images`, "
            "`annotations` and `categories`. Download it again or pass another --coco-dir."
        ) from error
    images: dict[int, Image] = {}
    for raw in raw_images:
        try:
            image = Image(int(raw["id"]), str(raw["file_name"]), int(raw["height"]), int(raw["width"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: image {raw!r:.120} lacks a usable id, file_name, height or width.") from error
        images[image.id] = image
    if photos is not None:
        present = {entry.name for entry in Path(photos).iterdir()}
        for image in images.values():
            if image.file_name not in present:
                raise InputError(
                    f"{file}: image {image.id} names {image.file_name}, which is not in {photos}. "
                    "Finish the download, or remove the image from the annotation file."
                )
    by_image: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    void = [
        {"id": -1 - int(raw["id"]), "image_id": raw["id"], "category_id": VOID, "iscrowd": 1, "segmentation": shape}
        for raw in raw_images
        if (shape := raw.get("void_rle"))
    ]
    for raw in (*raw_annotations, *void):
        annotation = _annotation(raw, images, categories | {VOID: "void"}, file)
        if annotation.area > 0:
            by_image[annotation.image_id].append(annotation)
    return Dataset(
        split=split,
        images=dict(sorted(images.items())),
        categories=dict(sorted(categories.items())),
        annotations={i: tuple(sorted(found, key=lambda a: a.id)) for i, found in sorted(by_image.items())},
    )


def _annotation(raw: dict, images: dict[int, Image], categories: dict[int, str], file: Path) -> Annotation:
    where = f"{file}: annotation {raw.get('id')}"
    image = images.get(raw.get("image_id"))
    if image is None:
        raise InputError(
            f"{where} is of image {raw.get('image_id')}, which is not listed under `images`. "
            "Remove the annotation or add its image."
        )
    if raw.get("category_id") not in categories:
        raise InputError(f"{where} has category {raw.get('category_id')}, which is not listed under `categories`.")
    shape = raw.get("segmentation")
    try:
        if isinstance(shape, list):
            rle = rle_tools.merge(rle_tools.frPyObjects(shape, image.height, image.width))
        elif isinstance(shape["counts"], list):
            rle = rle_tools.frPyObjects(shape, image.height, image.width)
        else:
            rle = {"size": shape["size"], "counts": shape["counts"].encode()}
        size = tuple(rle["size"])
        area = int(rle_tools.area(rle))
        x, y, w, h = (float(v) for v in (raw.get("bbox") or rle_tools.toBbox(rle)))
    except Exception as error:  # pycocotools raises a bare Exception for a shape it does not take
        raise InputError(f"{where}: `segmentation` is neither polygons nor an RLE ({error}).") from error
    if size != (image.height, image.width):
        raise InputError(f"{where}: its RLE is for {size}, but image {image.id} is {(image.height, image.width)}.")
    if not all(map(math.isfinite, (x, y, w, h))) or w < 0 or h < 0:
        raise InputError(f"{where}: bbox {raw.get('bbox')} is not [x, y, width, height] in pixels.")
    return Annotation(
        id=int(raw["id"]),
        image_id=image.id,
        category_id=int(raw["category_id"]),
        is_crowd=bool(raw.get("iscrowd", 0)),
        area=area,
        box=(x, y, x + w, y + h),
        counts=bytes(rle["counts"]),
    )


def decode(annotations: Iterable[Annotation], height: int, width: int) -> np.ndarray:
    """(height, width) uint8 union of the masks of `annotations`; zeros where there are none."""
    rles = [{"size": [height, width], "counts": one.counts} for one in annotations]
    if not rles:
        return np.zeros((height, width), np.uint8)
    return rle_tools.decode(rle_tools.merge(rles) if len(rles) > 1 else rles[0])


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


def run_lengths(counts: bytes) -> list[int]:
    """Run lengths (background first, column-major) of a compressed COCO RLE.

    The compression is COCO's: 5 bits a character from '0' on, bit 5 continues, and from the fourth run on the value is
    the difference to the run two before.
    """
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value, shift, more = 0, 0, True
        while more:
            character = counts[position] - 48
            value |= (character & 0x1F) << shift
            more = bool(character & 0x20)
            position += 1
            shift += 5
            if not more and character & 0x10:
                value |= -1 << shift
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
    return runs
