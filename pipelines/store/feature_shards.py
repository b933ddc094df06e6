"""One shard of a feature store: a Parquet file with one row, and one row group, per image.

It lies in the workspace as features/KEY/train/part-00000.parquet; store.json and the index beside it say what it is
and where an image is (`pipelines.store.reader`).

The layout (plain binary column, no compression, no dictionary, no statistics) is the fastest of those measured, and it
puts the bytes of an image in one piece at the end of its column chunk. So any Parquet reader reads a shard, and
`MappedShard` reads an image where it lies, without Parquet's cost per row group.
"""

import hashlib
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from la.backbone.quantised import quantise
from la.data.coco import Image
from la.errors import InputError
from pipelines.config import StoredDtype
from pipelines.workspace import digest, temporary_beside

FORMAT = 1  # of the files; raised whenever an older reader would misread a newer store
FLOAT16, INT8 = "<f2", "<i1"  # numpy's names of the stored numbers, little-endian
PAGE_HEADER = 256  # bytes; more than the header of a one-value page and the value's length ever take
_SETTINGS, _SHARD = b"la_settings", b"la_shard"

FEATURES = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("features", pa.large_binary(), nullable=False),
    ]
)


class StoreSettings(BaseModel):
    """All that decides the features; two stores agree in it exactly if they share their key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    annotations: dict[str, str]  # split -> sha256 of its annotation file
    backbone: str  # timm name
    weights: str  # la.backbone.vit.identify_weights: file digest or hub id
    image_size: int  # pixels a side
    preprocessing: dict[str, Any]
    layer: str
    dtype: StoredDtype = "float16"

    @property
    def key(self) -> str:
        return digest(self.model_dump(mode="json"))

    @property
    def keys_alike(self) -> set[str]:
        """The keys of all stores of these features, whatever the dtype: what was trained on one may use another."""
        return {self.model_copy(update={"dtype": dtype}).key for dtype in get_args(StoredDtype)}


class ShardNote(BaseModel):
    """What a shard says of itself in its footer."""

    key: str
    split: str
    number: int
    image_ids: list[int]  # asked of it, in order; rows are these without the skipped ones
    skipped: dict[str, str]  # file name -> reason
    weights_digest: str
    patch_size: int
    channels: int
    grid: tuple[int, int]
    features_sha256: str = ""

    @property
    def rows(self) -> int:
        return len(self.image_ids) - len(self.skipped)


def shard_file(split: str, number: int) -> str:
    """Path of a shard inside its store."""
    return f"{split}/part-{number:05d}.parquet"


class ShardWriter:
    """Writes the images of one shard one by one, under a temporary name, which `finish` makes the shard's own.

    An int8 store holds of each image its scales, (h, w) float16, and then its values, (h, w, C) int8. Leaving a `with`
    block without `finish` leaves nothing behind.
    """

    def __init__(self, path: Path, settings: StoreSettings):
        self._path, self._settings = path, settings
        self._temporary = temporary_beside(path)
        self._schema = FEATURES.with_metadata({_SETTINGS: settings.model_dump_json()})
        self._total = hashlib.sha256()
        with self._told():
            self._writer = pq.ParquetWriter(
                self._temporary,
                self._schema,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                data_page_size=1 << 30,  # bytes; a photo is never cut into pages
            )

    def add(self, image: Image, features: np.ndarray) -> None:
        """features (h, w, C) float16. Raises InputError where the file cannot be written, on a full disk say."""
        content = _encoded(features, self._settings.dtype)
        self._total.update(content)
        columns = [[image.id], [image.height], [image.width], [content]]
        with self._told():
            self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=1)

    def finish(self, note: ShardNote) -> ShardNote:
        """Close the shard; returns the note that it holds, `note` with the features' checksum. InputError as `add`."""
        whole = note.model_copy(update={"features_sha256": self._total.hexdigest()})
        with self._told():
            self._writer.add_key_value_metadata({_SHARD: whole.model_dump_json()})
            self._writer.close()
            os.replace(self._temporary, self._path)
        return whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(OSError):  # what made the disk full has been told
                self._writer.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self._path} cannot be written ({error}). Make room, then the same command goes on where it was."
            ) from error


def write_shard(
    path: Path, settings: StoreSettings, note: ShardNote, rows: Iterable[tuple[Image, np.ndarray]]
) -> ShardNote:
    """Write (image, (h, w, C) float16) rows as one shard, whole or not at all. Returns the note with its checksum."""
    with ShardWriter(path, settings) as shard:
        for image, features in rows:
            shard.add(image, features)
        return shard.finish(note)


def _encoded(features: np.ndarray, dtype: StoredDtype) -> bytes:
    if dtype == "float16":
        return np.ascontiguousarray(features, FLOAT16).tobytes()
    values, scales = quantise(features)
    return scales.astype(FLOAT16).tobytes() + values.astype(INT8).tobytes()


def open_shard(path: Path, key: str) -> tuple[pq.ParquetFile, ShardNote]:
    """A shard and what it says of itself. Raises InputError where it is damaged or belongs to another store."""
    try:
        file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
        note = ShardNote.model_validate_json(file.metadata.metadata[_SHARD])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValidationError) as error:
        raise damaged(path, error) from error
    if note.key != key:
        raise InputError(
            f"{path} was made with other settings (store {note.key}) than this store's ({key}). "
            f"Remove {path} and run `featurize` again."
        )
    return file, note


def checked_shard(path: Path, key: str, expected: str) -> ShardNote:
    """Read a shard whole; returns what it says of itself. Raises InputError unless its checksum is `expected`."""
    shard, note = open_shard(path, key)
    total = hashlib.sha256()
    try:
        for batch in shard.iter_batches(batch_size=1, columns=["features"], use_threads=False):
            total.update(batch.column(0)[0].as_buffer())
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    if total.hexdigest() != expected:
        raise damaged(path, ValueError("its checksum is not the one in store.json"))
    return note


class MappedShard:
    """The features of an open shard, read in place. Raises InputError where they do not lie as they should."""

    def __init__(self, path: Path, key: str, shape: tuple[int, int, int], dtype: StoredDtype = "float16"):
        file, _ = open_shard(path, key)
        h, w, channels = shape
        size = h * w * (2 * channels if dtype == "float16" else 2 + channels)
        self._shape = shape
        self._starts = []
        column = file.schema_arrow.get_field_index("features")
        if column < 0:
            raise damaged(path, ValueError("it has no features"))
        whole = path.stat().st_size
        for group in range(file.metadata.num_row_groups):
            chunk = file.metadata.row_group(group).column(column)
            header = chunk.total_compressed_size - size
            if chunk.compression != "UNCOMPRESSED" or chunk.num_values != 1 or not 0 < header <= PAGE_HEADER:
                raise damaged(path, ValueError(f"row group {group} is not one plain image of {size} bytes"))
            if not 0 <= chunk.data_page_offset <= whole - header - size:
                raise damaged(path, ValueError(f"row group {group} lies beyond its end"))
            self._starts.append(chunk.data_page_offset + header)
        with open(path, "rb") as content:
            self._bytes = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, group: int) -> np.ndarray:
        """(h, w, C) float16 view, read-only, of the image in a row group of a float16 store."""
        return self._view(FLOAT16, self._shape, self._starts[group])

    def read_quantised(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """(h, w, C) int8 and (h, w) float16: views, read-only, of the values and scales in an int8 store."""
        h, w, _ = self._shape
        start = self._starts[group]
        return self._view(INT8, self._shape, start + 2 * h * w), self._view(FLOAT16, (h, w), start)

    def _view(self, dtype: str, shape: tuple[int, ...], start: int) -> np.ndarray:
        return np.frombuffer(self._bytes, dtype, math.prod(shape), start).reshape(shape)


def damaged(path: Path, error: object) -> InputError:
    """The error for a file of a store that cannot be read."""
    return InputError(
        f"{path} is missing, damaged or not a file of a feature store ({type(error).__name__}: {error!s:.120}). "
        "Remove it and the store's store.json, then run `featurize` again: only what is missing is made."
    )
