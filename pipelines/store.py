"""The Parquet feature store: what a frozen ViT saw in every photo, and the annotations, so nothing reads photos again.

A store is one folder for one (annotations, backbone, weights, image size, preprocessing, layer, dtype):

    train/part-00000.parquet ...   val/part-00000.parquet ...   one row, and one row group, per image
    annotations-train.parquet      annotations-val.parquet      images with their annotations as RLE
    index.parquet                  image_id, split, shard, row_group, height, width
    store.json                     everything above in words; written last, so its presence means the store is complete
The key, which names the folder, is a digest of what it was made from; see StoreSettings.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from la.coco import Dataset
from la.errors import InputError
from pipelines.annotations import read_dataset, write_dataset
from pipelines.shards import DTYPE, FORMAT, MappedShard, StoreSettings, damaged, open_shard, shard_file
from pipelines.workspace import write_whole

_INDEX = pa.schema(
    {
        "image_id": pa.int64(),
        "split": pa.string(),
        "shard": pa.int32(),
        "row_group": pa.int32(),
        "height": pa.int32(),
        "width": pa.int32(),
    }
)


class SplitInfo(BaseModel):
    """One split of a store: its name in the COCO folder, counts, and photos left out with the reason."""

    name: str
    images: int
    annotations: int
    skipped: dict[str, str]  # file name -> reason


class StoreInfo(BaseModel):
    """`store.json`."""

    model_config = ConfigDict(frozen=True)

    key: str
    settings: StoreSettings
    weights_digest: str  # sha256 of the state dict in use, see la.backbone.Backbone
    patch_size: int  # pixels
    channels: int
    grid: tuple[int, int]  # tokens
    splits: dict[str, SplitInfo]
    shards: dict[str, str]  # file -> sha256 of all its feature bytes in row order
    coco_dir: str  # where the photos were, for people to read; no part of the key
    software: dict[str, str]  # versions that made it

    @property
    def skipped(self) -> dict[str, str]:
        """file name -> reason, of all splits"""
        return {file: why for split in self.splits.values() for file, why in split.skipped.items()}

    @property
    def backbone(self) -> str:
        return self.settings.backbone

    @property
    def weights(self) -> str:
        return self.settings.weights

    @property
    def image_size(self) -> int:
        return self.settings.image_size

    @property
    def dtype(self) -> str:
        return self.settings.dtype


def finish_store(path: Path, info: StoreInfo, datasets: dict[str, Dataset]) -> None:
    """Write annotations, index and, last of all, store.json; every shard must be in place."""
    rows: list[tuple] = []
    for file in sorted(info.shards):
        note = open_shard(path / file, info.key)[1]
        images = datasets[note.split].images
        kept = [images[i] for i in note.image_ids if i in images]
        rows += [(image.id, note.split, note.number, g, image.height, image.width) for g, image in enumerate(kept)]
    for split, dataset in datasets.items():
        write_dataset(path / f"annotations-{split}.parquet", dataset)
    columns = list(zip(*rows, strict=True)) if rows else [[] for _ in _INDEX]
    index = pa.table([list(column) for column in columns], schema=_INDEX)
    write_whole(path / "index.parquet", lambda temporary: pq.write_table(index, temporary, compression="zstd"))
    content = info.model_dump_json(indent=2)
    for leftover in path.glob("*/.part-*.tmp"):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    write_whole(path / "store.json", lambda temporary: temporary.write_text(content + "\n"))


def read_info(path: Path) -> StoreInfo:
    """`store.json` of a complete store. Raises InputError where it is missing, damaged or of another format."""
    file = Path(path) / "store.json"
    try:
        content = json.loads(file.read_text())
        version = content["settings"]["format"]
    except FileNotFoundError as error:
        raise InputError(f"{path} is no complete feature store: no store.json. Run `featurize` to the end.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, error) from error
    if version != FORMAT:
        raise InputError(
            f"{file} is of store format {version}; this version reads format {FORMAT}. "
            "Run `featurize` again, or use the version that made it."
        )
    try:
        info = StoreInfo.model_validate(content)
    except ValidationError as error:
        raise damaged(file, error) from error
    if info.settings.key != info.key:
        raise InputError(
            f"{file} names key {info.key}, but its settings give {info.settings.key}: it was edited or its settings "
            "are another store's. Remove it and run `featurize` again."
        )
    return info


class FeatureStore:
    """Reads one complete store. Cheap to pickle: files open lazily, once per process.

    Raises InputError from any member for a store that is incomplete, damaged or of another format.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        self._shards: dict[str, MappedShard] = {}
        self._datasets: dict[str, Dataset] = {}

    def __reduce__(self) -> tuple:
        return FeatureStore, (self.path,)

    @cached_property
    def info(self) -> StoreInfo:
        return read_info(self.path)

    @property
    def key(self) -> str:
        return self.info.key

    @cached_property
    def _index(self) -> dict[int, tuple[str, int, str]]:
        """image id -> (shard file, row group, split)"""
        file = self.path / "index.parquet"
        try:
            table = pq.read_table(file, schema=_INDEX, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            raise damaged(file, error) from error
        columns = (table[name].to_pylist() for name in ("image_id", "split", "shard", "row_group"))
        return {i: (shard_file(split, shard), group, split) for i, split, shard, group in zip(*columns, strict=True)}

    def image_ids(self, split: str) -> list[int]:
        """Sorted ids of the images of a split, "train" or "val"."""
        return sorted(self.dataset(split).images)

    def dataset(self, split: str) -> Dataset:
        """Images and annotations of a split, without photos that were skipped; read once per process."""
        if split not in self.info.splits:
            raise InputError(f"{self.path} has no split {split!r}; choose {' or '.join(self.info.splits)}.")
        if split not in self._datasets:
            self._datasets[split] = read_dataset(self.path / f"annotations-{split}.parquet")
        return self._datasets[split]

    def read(self, image_id: int) -> np.ndarray:
        """(h, w, C) float16 features of an image: a read-only view of its shard, not a copy.

        Raises InputError for an id the store lacks.
        """
        try:
            file, group, _ = self._index[image_id]
        except KeyError as error:
            raise InputError(
                f"image {image_id} is not in the store {self.path} ({len(self._index)} images); it was skipped, or is "
                "of another data set. Make store and episodes from the same COCO folder."
            ) from error
        shard = self._shards.get(file)
        if shard is None:
            shard = self._shards[file] = MappedShard(self.path / file, self.key, self._shape)
        try:
            return shard.read(group)
        except IndexError as error:
            raise damaged(self.path / file, error) from error

    def read_batch(self, image_ids: Sequence[int]) -> torch.Tensor:
        """(n, h, w, C) float16 features of `image_ids`, in their order, copied out."""
        batch = np.empty((len(image_ids), *self._shape), DTYPE)
        for row, image_id in zip(batch, image_ids, strict=True):
            row[...] = self.read(image_id)
        return torch.from_numpy(batch)

    def verify(self) -> Iterator[str]:
        """Read every shard once and compare its checksum; yields each good shard's file, so progress shows."""
        for file, expected in sorted(self.info.shards.items()):
            shard = open_shard(self.path / file, self.key)[0]
            total = hashlib.sha256()
            try:
                for batch in shard.iter_batches(batch_size=1, columns=["features"], use_threads=False):
                    total.update(batch.column(0)[0].as_buffer())
            except (OSError, pa.ArrowException) as error:
                raise damaged(self.path / file, error) from error
            if total.hexdigest() != expected:
                raise damaged(self.path / file, ValueError("its checksum is not the one in store.json"))
            yield file

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        return (*self.info.grid, self.info.channels)
