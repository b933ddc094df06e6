"""The images and annotations of one split as one Parquet table, so that no later verb needs the COCO folder."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from la.data.coco import VOID, Annotation, Dataset, Image, check_image
from pipelines.store.feature_shards import damaged
from pipelines.workspace import write_whole

_DATASET = b"la_dataset"
_ANNOTATION = pa.struct(
    {"id": pa.int64(), "category_id": pa.int32(), "is_crowd": pa.bool_(), "area": pa.int64()}
    | dict.fromkeys(("x0", "y0", "x1", "y1"), pa.float64())
    | {"counts": pa.binary()}
)
_IMAGES = pa.schema(
    {
        "image_id": pa.int64(),
        "file_name": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "annotations": pa.list_(_ANNOTATION),
    }
)


def write_dataset(path: Path, dataset: Dataset) -> None:
    """Write the images and annotations of a split as one table, one row per image."""
    images = list(dataset.images.values())
    found = [dataset.annotations.get(image.id, ()) for image in images]
    flat = [one for group in found for one in group]
    corners = np.array([one.box for one in flat], np.float64).reshape(-1, 4)
    plain = ("id", "category_id", "is_crowd", "area")
    columns = [pa.array([getattr(one, f) for one in flat], _ANNOTATION.field(f).type) for f in plain]
    columns += [pa.array(corners[:, i]) for i in range(4)]
    columns.append(pa.array([one.counts for one in flat], pa.binary()))
    offsets = pa.array(np.cumsum([0] + [len(group) for group in found]), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, fields=list(_ANNOTATION)))
    about = {"split": dataset.split, "categories": sorted(dataset.categories.items())}
    of_images = [[getattr(image, f) for image in images] for f in ("id", "file_name", "height", "width")]
    table = pa.table([*of_images, lists], schema=_IMAGES.with_metadata({_DATASET: json.dumps(about)}))
    write_whole(path, lambda temporary: pq.write_table(table, temporary, compression="zstd", write_page_checksum=True))


def read_dataset(path: Path) -> Dataset:
    """The dataset `write_dataset` was given, equal to it.

    Raises InputError for a damaged file, and for one of a store from elsewhere whose content cannot be. Whether run
    lengths cover their photo is looked at where a mask is used: see `la.data.coco.runs_of`.
    """
    try:
        table = pq.read_table(path, memory_map=True, page_checksum_verification=True, use_threads=False)
        dataset = _dataset(table.combine_chunks())
        del table
        pa.default_memory_pool().release_unused()  # what reading took is as much again
        return dataset
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _dataset(table: pa.Table) -> Dataset:
    """Raises ValueError, and others, for a table that `write_dataset` did not write."""
    about = json.loads(table.schema.metadata[_DATASET])
    categories = {int(i): str(name) for i, name in about["categories"]}
    if not table.schema.equals(_IMAGES):
        raise ValueError("its columns are not those of images and annotations")
    table.validate(full=True)
    lists = table["annotations"].combine_chunks()
    columns = lists.flatten().flatten()
    if any(column.null_count for column in (*table.columns, *columns)):
        raise ValueError("it has empty fields")
    rows = zip(*(table[f].to_pylist() for f in ("image_id", "file_name", "height", "width")), strict=True)
    images = {row[0]: Image(*row) for row in rows}
    fields = dict(zip(_ANNOTATION.names, columns, strict=True))
    _check(images, table.num_rows, categories, fields)
    return Dataset(
        split=str(about["split"]),
        images=images,
        categories=categories,
        annotations=_Annotations(images, np.asarray(lists.value_lengths()), fields),
    )


class _Annotations(Mapping[int, tuple[Annotation, ...]]):
    """image id -> its annotations, made when asked for: as Python objects COCO's 900,000 would take more than 1 GB."""

    def __init__(self, image_ids: Iterable[int], lengths: np.ndarray, fields: dict[str, pa.Array]):
        self._place = {image_id: place for place, image_id in enumerate(image_ids)}
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._counts = fields["counts"]
        self._columns = [column.to_numpy(zero_copy_only=False) for name, column in fields.items() if name != "counts"]

    def __getitem__(self, image_id: int) -> tuple[Annotation, ...]:
        place = self._place[image_id]
        part = slice(self._ends[place - 1] if place else 0, self._ends[place])
        columns = (column[part].tolist() for column in self._columns)
        return tuple(
            Annotation(i, image_id, category, is_crowd, area, tuple(box), counts)
            for i, category, is_crowd, area, *box, counts in zip(*columns, self._counts[part].to_pylist(), strict=True)
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def _check(images: dict[int, Image], rows: int, categories: dict[int, str], fields: dict[str, pa.Array]) -> None:
    for image in images.values():
        check_image(image)
    ids = np.asarray(fields["id"])
    if len(images) != rows or len(np.unique(ids)) != len(ids):
        raise ValueError("two images or two annotations have the same id")
    if not set(np.unique(fields["category_id"]).tolist()) <= {VOID, *categories}:
        raise ValueError("an annotation has a category that is not listed")
    x0, y0, x1, y1 = (np.asarray(fields[c]) for c in ("x0", "y0", "x1", "y1"))
    if not (np.isfinite([x0, y0, x1, y1]).all() and (x0 <= x1).all() and (y0 <= y1).all()):
        raise ValueError("a box is not finite or has a side below 0")
    if (np.asarray(fields["area"]) < 1).any():
        raise ValueError("an annotation has no pixels")
