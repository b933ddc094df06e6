"""Results and annotations as files: one COCO document, PNG with the user's colours, and parts of the page."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from jinja2 import Environment, PackageLoader
from pycocotools import mask as rle_tools

from pipelines.predict.mask_files import coco_file, coco_results, indexed, palette

Colour = tuple[int, int, int]  # RGB
# The parts of the page that are markup, beside this module; what is put into them cannot become markup.
template = Environment(loader=PackageLoader("pipelines.serve", "."), autoescape=True).get_template


def coco_document(photos: Iterable[tuple[str, np.ndarray, Sequence[float]]], classes: Sequence[str]) -> dict:
    """COCO instances of (name, mask (H, W), scores (N,)) of each photo; category i + 1 is `classes[i]`."""

    def annotations(mask: np.ndarray, scores: Sequence[float]) -> list[dict]:
        results = coco_results(mask, scores, range(1, len(classes) + 1))
        return [result | {"area": int(rle_tools.area(result["segmentation"]))} for result in results]

    return coco_file(((name, mask.shape, annotations(mask, scores)) for name, mask, scores in photos), classes)


def png(mask: np.ndarray, colours: Sequence[Colour] | None = None, clear_background: bool = False) -> bytes:
    """Indexed PNG whose pixels are labels; `colours[i]` is that of label i + 1, by default VOC's palette."""
    image = indexed(mask)
    if colours is not None:
        table = palette()
        table[1 : len(colours) + 1] = colours
        image.putpalette(table.tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", **({"transparency": 0} if clear_background else {}))
    return file.getvalue()
