"""A small COCO-format data set of synthetic scenes, for runs without a network or a download.

A class is a pair of a shape and a texture ("striped star"): ten shapes times eight textures make the
eighty categories.  Colours are drawn per object and tell nothing of the class.  In the COCO-20i folds
(fold f holds out the categories at positions f, f + 4, f + 8, ...) every held-out category is a new pair
of a shape and a texture, each of which occurs in other pairs among the sixty categories trained on.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.demo.drawing import SHAPES, TEXTURES, Scene, compose
from pipelines.predict.mask_files import shape_of

# Raised whenever the drawing or the files change, so that an older folder is not taken for a current one.
VERSION = 3
SPLITS = ("train2017", "val2017")
FOLDS = 4
RECORD = "scenes.json"


def _pairs() -> list[tuple[int, int]]:
    # Shifting the texture by the shape makes the fold (texture - shape) mod 4: a fold holds out two of
    # every shape's eight textures, and no whole shape or texture.
    count = len(TEXTURES)
    return [(shape, (k + shape) % count) for shape in range(len(SHAPES)) for k in range(count)]


# Shape and texture (positions in SHAPES and TEXTURES) of the category with id 1 + position.
PAIRS: list[tuple[int, int]] = _pairs()
CLASS_NAMES: list[str] = [f"{list(TEXTURES)[t]} {list(SHAPES)[s]}" for s, t in PAIRS]


def draw_scene(seed: int, split: str, number: int, size: tuple[int, int] = (128, 128)) -> Scene:
    """Scene ``number`` (from 0) of ``split``: a pure function of the arguments.

    Raises ``ValueError`` for a split that is not one of ``SPLITS``.
    """
    which = SPLITS.index(split)
    # Two objects of each scene come from a shuffled round of all classes, so that none is ever rare.
    per_round = len(PAIRS) // 2
    turns = np.random.default_rng([seed, which, 1, number // per_round]).permutation(len(PAIRS))
    kinds = [PAIRS[turns[number % per_round]], PAIRS[turns[number % per_round + per_round]]]
    rng = np.random.default_rng([seed, which, 0, number])
    for _ in range(rng.integers(0, 3)):
        shape, texture = PAIRS[rng.integers(len(PAIRS))]
        like = kinds[rng.integers(2)]
        # Near misses and second objects of a class, so that neither shape nor texture alone is enough.
        choice = rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])
        kinds.append([(shape, texture), (like[0], texture), (shape, like[1]), like][choice])
    return compose(rng, kinds, size, list(SHAPES.values()), list(TEXTURES.values()))


def _write_split(folder: Path, split: str, count: int, first_id: int, size: tuple[int, int], seed: int) -> None:
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    for number in range(count):
        scene = draw_scene(seed, split, number, size)
        image_id = first_id + number
        name = f"{image_id:012d}.jpg"
        # Without chroma subsampling: the textures differ in colour as much as in lightness.
        Image.fromarray(scene.image).save(folder / split / name, quality=92, subsampling=0)
        images.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        for k, thing in enumerate(scene.things, start=1):
            mask = scene.instances == k
            annotation = {"id": 10 * image_id + k, "image_id": image_id, "iscrowd": 0, "area": float(mask.sum())}
            annotation["category_id"] = PAIRS.index((thing.shape, thing.texture)) + 1
            annotations.append(annotation | shape_of(mask))
    shapes = list(SHAPES)
    categories = [
        {"id": number, "name": name, "supercategory": shapes[shape]}
        for number, (name, (shape, _)) in enumerate(zip(CLASS_NAMES, PAIRS, strict=True), start=1)
    ]
    info = {"description": f"synthetic scenes, version {VERSION}"}
    content = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _record(root: Path) -> dict | None:
    try:
        return json.loads((root / RECORD).read_text())
    except (OSError, ValueError):
        return None


def draw_scenes(
    root: Path, *, train_images: int = 400, val_images: int = 160, size: tuple[int, int] = (128, 128), seed: int = 0
) -> Path:
    """Draw the data set into ``root``, laid out as a COCO 2017 download, and return ``root``.

    ``size`` is (height, width) in pixels.  Image ids run on from the train split to the val split.  An
    annotation covers the part of the object that is in sight.  A folder already drawn with the same
    arguments is kept, one drawn with others is replaced; the folder appears only once it is whole.

    Raises ``ValueError`` for a size below 64 pixels or an empty split, ``FileExistsError`` if ``root``
    holds something this function did not draw.
    """
    root = Path(root)
    if min(size) < 64 or min(train_images, val_images) < 1:
        raise ValueError(
            f"need images of at least 64 pixels and one per split, got {size}, "
            f"{train_images} train and {val_images} val images"
        )
    sizes = {"train_images": train_images, "val_images": val_images, "size": list(size)}
    wanted = {"version": VERSION, **sizes, "seed": seed}
    if _record(root) == wanted:
        return root
    if root.exists() and _record(root) is None and not (root.is_dir() and not any(root.iterdir())):
        raise FileExistsError(f"{root} exists and was not drawn by draw_scenes; name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as partial:
        drawn = Path(partial, "drawn")
        _write_split(drawn, "train2017", train_images, 1, size, seed)
        _write_split(drawn, "val2017", val_images, 1 + train_images, size, seed)
        (drawn / RECORD).write_text(json.dumps(wanted))
        if root.exists():
            os.replace(root, Path(partial, "old"))
        try:
            os.replace(drawn, root)
        except OSError:
            # Another process drawing the same data set was first; what it drew is the same.
            if _record(root) != wanted:
                raise
    return root
