"""Masks of a split's instances at a grid's resolution, drawn once and kept beside the store's annotations.

`masks-train-120x120.arrow` has one row per annotation: its id and, packed by zlib, which checks what it unpacks, where
on the grid the instance lies and its cells there. All of it follows from the annotations: a file that is missing, or
is of other annotations, is made when it is first asked for, so it may be removed at any time.
"""

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image as Pillow
from pyarrow import feather

from la.data.coco import Annotation, Dataset, Image, decode
from la.errors import InputError
from pipelines.workspace import write_whole

AT_ONCE = 4096  # photos whose annotations are in memory while masks are drawn
_SCHEMA = pa.schema({"id": pa.int64(), "mask": pa.large_binary()})
_HEAD = 4  # numbers before the cells: row, column, height and width of the part that is not empty


class SmallMasks:
    """annotation id -> its mask on a grid of `size`, read from `file`, which is made where it does not fit `dataset`.

    Where the store cannot be written to they are kept in memory. Raises InputError for an annotation that is damaged.
    """

    def __init__(self, file: Path, dataset: Dataset, size: tuple[int, int]):
        self._file, self._size = file, size
        schema = _SCHEMA.with_metadata({"annotations": dataset.digest})
        try:
            table = _read(file, schema)
        except (OSError, ValueError, pa.ArrowException):
            table = _drawn(dataset, size, schema)
            with suppress(OSError):
                write_whole(
                    file, lambda path: feather.write_feather(table, path, "uncompressed", chunksize=len(table) or 1)
                )
                table = _read(file, schema)  # of which all processes of a machine share one copy
                pa.default_memory_pool().release_unused()
        self._ids, self._masks = table["id"].to_numpy(), table["mask"]

    def __getitem__(self, annotation_id: int) -> tuple[tuple[slice, slice], np.ndarray]:
        """The part of the grid that the instance touches and, in it, the share of each cell, uint8, 255 = covered.

        Raises InputError where the file is damaged.
        """
        row = int(np.searchsorted(self._ids, annotation_id))
        try:
            if self._ids[row] != annotation_id:
                raise IndexError(f"annotation {annotation_id} is not in it")
            most, unpacking = 2 * _HEAD + self._size[0] * self._size[1], zlib.decompressobj()
            content = unpacking.decompress(self._masks[row].as_buffer(), most + 1)
            top, left, height, width = map(int, np.frombuffer(content, "<u2", _HEAD))
            if not unpacking.eof or top + height > self._size[0] or left + width > self._size[1]:
                raise ValueError(f"annotation {annotation_id} does not fit the grid")
            cells = np.frombuffer(content, np.uint8, offset=2 * _HEAD).reshape(height, width)
        except (IndexError, ValueError, zlib.error) as error:
            raise InputError(
                f"{self._file} is damaged ({type(error).__name__}: {error!s:.120}). Remove it: it is made again."
            ) from error
        return (slice(top, top + height), slice(left, left + width)), cells


def _read(file: Path, schema: pa.Schema) -> pa.Table:
    """Raises OSError, ValueError or an ArrowException for a file that is not there or not of these annotations."""
    table = feather.read_table(file, memory_map=True)
    if not table.schema.equals(schema, check_metadata=True):
        raise ValueError("it is of other annotations")
    table.validate(full=True)
    return table


def _drawn(dataset: Dataset, size: tuple[int, int], schema: pa.Schema) -> pa.Table:
    ids = np.sort([one.id for found in dataset.annotations.values() for one in found]).astype(np.int64)
    packed: list[bytes] = [b""] * len(ids)

    def draw(image: Image) -> Iterator[tuple[int, bytes]]:
        return [(one.id, _packed(image, one, size)) for one in dataset.annotations[image.id]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(dataset.images.values())
        for start in range(0, len(images), AT_ONCE):
            for drawn in pool.map(draw, images[start : start + AT_ONCE]):
                for annotation_id, content in drawn:
                    packed[np.searchsorted(ids, annotation_id)] = content
    return pa.table([ids, pa.array(packed, pa.large_binary())], schema=schema)


def _packed(image: Image, annotation: Annotation, size: tuple[int, int]) -> bytes:
    mask = decode([annotation], image.height, image.width) * np.uint8(255)
    cells = np.asarray(Pillow.fromarray(mask).resize(size[::-1], Pillow.Resampling.BOX))
    rows, columns = (np.flatnonzero(cells.any(axis)) for axis in (1, 0))
    top, left, bottom, right = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1) if len(rows) else (0, 0, 0, 0)
    head = np.array([top, left, bottom - top, right - left], "<u2")
    return zlib.compress(head.tobytes() + cells[top:bottom, left:right].tobytes(), 1)
