"""Masks as COCO files write them, polygons and run lengths, checked before pycocotools' C code trusts them.

That code writes beyond its buffers or never ends where runs do not add up or a polygon reaches far out, and annotation
files come from anywhere.
"""

import numpy as np
from pycocotools import mask as rle_tools

MAX_PIXELS = 89_478_485  # of one photo; Pillow's limit, 256 MB of RGB
BORDER = 0.1  # of the photo's side that outlines may reach beyond it: tools round, and pycocotools clips
MAX_OUTLINE = 5_000_000  # pixels along one polygon; pycocotools takes 40 bytes for each
_CHARACTERS_A_RUN = 7  # of 5 bits each: more than any run within MAX_PIXELS needs


def compress(shape: object, height: int, width: int) -> bytes:
    """The compressed run lengths of an annotation's `segmentation`: polygons, or an RLE with counts of either kind.

    Polygons are clipped to the photo. Empty runs are joined, which pycocotools' own union of masks stumbles over.
    Raises ValueError that says what was found, what was expected and what to do.
    """
    if isinstance(shape, list):
        if not shape:
            raise ValueError("`segmentation` is empty; expected polygons or an RLE. Add the mask, or remove it.")
        polygons = [_polygon(points, place, height, width) for place, points in enumerate(shape)]
        return rle_tools.merge(rle_tools.frPyObjects(polygons, height, width))["counts"]
    if not isinstance(shape, dict):
        raise ValueError(
            f"`segmentation` is neither polygons nor an RLE but {type(shape).__name__}; expected [[x, y, ...], ...] or "
            '{"size": [height, width], "counts": ...}. Fix or remove it.'
        )
    if shape.get("size") != [height, width]:
        raise ValueError(
            f"its RLE is for size {shape.get('size')!s:.60}, but the photo's height and width are {[height, width]}. "
            "Make both of the same photo."
        )
    runs = _joined(_checked(_runs_of(shape.get("counts")), height, width))
    return rle_tools.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"]


def run_lengths(counts: bytes) -> list[int]:
    """Run lengths (background first, column-major) of a compressed COCO RLE.

    The compression is COCO's: 5 bits a character from '0' on, bit 5 continues, and from the fourth run on the value is
    the difference to the run two before. Raises ValueError for bytes that are not so.
    """
    if not counts:
        return []
    characters = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if characters.min() < 0 or characters.max() > 63 or characters[-1] & 0x20:
        raise ValueError("its RLE `counts` are no compressed run lengths; expected what pycocotools' `encode` writes.")
    last = np.flatnonzero(characters < 0x20)  # of each run
    first = np.concatenate(([0], last[:-1] + 1))
    if (last - first >= _CHARACTERS_A_RUN).any():
        raise ValueError("its RLE `counts` hold a run longer than any photo; expected compressed run lengths.")
    shifts = 5 * (np.arange(len(characters)) - np.repeat(first, last - first + 1))
    runs = np.add.reduceat((characters & 0x1F) << shifts, first)
    runs -= (characters[last] >> 4 & 1) << (shifts[last] + 5)  # the sign
    for start in (1, 2):
        runs[start::2] = runs[start::2].cumsum()
    return runs.tolist()


def stored_run_lengths(counts: bytes, height: int, width: int) -> list[int]:
    """`run_lengths` of a mask for a photo of this size. Raises ValueError unless they cover it."""
    return _checked(run_lengths(counts), height, width)


def _polygon(points: object, place: int, height: int, width: int) -> list[float]:
    if not isinstance(points, list) or not set(map(type, points)) <= {int, float}:
        raise ValueError(
            f"polygon {place} of `segmentation` is not a flat list of numbers; expected [x0, y0, x1, y1, ...] in "
            "pixels. Fix or remove it."
        )
    if len(points) % 2 or len(points) < 6:
        raise ValueError(
            f"polygon {place} of `segmentation` has {len(points)} numbers; expected an even count from 6 on, the x and "
            "y of its corners. Fix or remove it."
        )
    xs, ys = points[::2], points[1::2]
    if not (_within(xs, width) and _within(ys, height)):
        raise ValueError(
            f"polygon {place} of `segmentation` spans x {_span(xs)} and y {_span(ys)}, outside the photo of "
            f"{width}x{height} pixels; expected it inside, or up to a tenth of the side beyond. If it was drawn on a "
            "photo of another size, scale it; else fix or remove it."
        )
    if len(xs) * max(height, width) > MAX_OUTLINE:  # only then may it be so long
        corners = np.array(points, np.float64).reshape(-1, 2)
        length = np.abs(corners - np.roll(corners, 1, 0)).max(1).sum()
        if length > MAX_OUTLINE:
            raise ValueError(
                f"polygon {place} of `segmentation` is {length:.0f} pixels long; expected at most {MAX_OUTLINE}. Write "
                "so fine a mask as an RLE, or remove it."
            )
    return points


def _within(values: list[float], side: int) -> bool:
    """Finite, touching the photo and at most BORDER beyond it."""
    low, high = min(values), max(values)
    return -BORDER * side <= low <= side and 0 <= high <= (1 + BORDER) * side and not any(v != v for v in values)


def _span(values: list[float]) -> str:
    return f"{min(values)!s:.12} to {max(values)!s:.12}"


def _runs_of(counts: object) -> list[int]:
    if isinstance(counts, str):
        return run_lengths(counts.encode("latin-1", "replace"))
    if isinstance(counts, list) and set(map(type, counts)) <= {int}:
        return counts
    raise ValueError(
        f"its RLE `counts` are {type(counts).__name__}; expected a list of whole numbers or a compressed string. "
        "Fix or remove it."
    )


def _checked(runs: list[int], height: int, width: int) -> list[int]:
    if min(runs, default=0) < 0:
        raise ValueError(f"its RLE `counts` have a run of {min(runs)} pixels; expected none below 0. Fix or remove it.")
    if sum(runs) != height * width:
        raise ValueError(
            f"its RLE `counts` add up to {sum(runs)} pixels; expected {height * width}, as many as the photo has. "
            "Fix or remove it."
        )
    return runs


def _joined(runs: list[int]) -> list[int]:
    """The same mask without empty runs after the first."""
    joined = [0]
    for place, run in enumerate(runs):
        if run and place % 2 == len(joined) % 2:
            joined.append(run)
        else:
            joined[-1] += run
    return joined
