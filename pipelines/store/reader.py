"""The Parquet feature store: what a frozen ViT saw in every photo, and the annotations, so nothing reads photos again.

A store is one folder for one (annotations, backbone, weights, image size, preprocessing, layer, dtype):

    train/part-00000.parquet ...   val/part-00000.parquet ...   one row, and one row group, per image
    annotations-train.parquet      annotations-val.parquet      images with their annotations as RLE
    masks-train-120x120.arrow ...                               made of these at first use, see SmallMasks
    index.parquet                  image_id, split, shard, row_group, height, width
    store.json                     everything above in words; written last, so its presence means the store is complete
The key, which names the folder, is a digest of what it was made from; see StoreSettings.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from la.backbone.quantised import Quantised
from la.data.coco import Dataset
from la.errors import InputError
from pipelines.store.annotations import read_dataset, write_dataset
from pipelines.store.buffers import Buffers
from pipelines.store.feature_shards import (
    FORMAT,
    MappedShard,
    ShardNote,
    StoreSettings,
    checked_shard,
    damaged,
    open_shard,
    shard_file,
)
from pipelines.store.small_masks import SmallMasks
from pipelines.workspace import write_whole

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # of mapped shards, which are only read
T = TypeVar("T")
MOST_NUMBERS = 2**30  # of one photo's features: 2 GB
ShardName = Annotated[str, Field(pattern=r"^\w+/part-\d{5,9}\.parquet$")]
_INDEX = pa.schema(
    {"image_id": pa.int64(), "split": pa.string()}
    | dict.fromkeys(("shard", "row_group", "height", "width"), pa.int32())
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
    weights_digest: str  # sha256 of the state dict in use, see la.backbone.vit.Backbone
    patch_size: PositiveInt  # pixels
    channels: PositiveInt
    grid: tuple[PositiveInt, PositiveInt]  # tokens
    splits: dict[str, SplitInfo]
    shards: dict[ShardName, str]  # file -> sha256 of all its feature bytes in row order
    coco_dir: str  # where the photos were, for people to read; no part of the key
    batch_size: int = 8  # photos at once; another number rounds otherwise, so a repair takes the same
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
    rows: list[dict] = []
    for file in sorted(info.shards):
        note = open_shard(path / file, info.key)[1]
        images = datasets[note.split].images
        kept = [images[i] for i in note.image_ids if i in images]
        shard = {"split": note.split, "shard": note.number}
        for group, image in enumerate(kept):
            about = {"image_id": image.id, "row_group": group, "height": image.height, "width": image.width}
            rows.append(shard | about)
    for split, dataset in datasets.items():
        write_dataset(path / f"annotations-{split}.parquet", dataset)
    index = pa.Table.from_pylist(rows, schema=_INDEX)
    write_whole(path / "index.parquet", lambda temporary: pq.write_table(index, temporary, compression="zstd"))
    write_info(path, info)


def write_info(path: Path, info: StoreInfo) -> None:
    """Write store.json, which makes the store complete: everything else must be in place, and the store locked."""
    content = info.model_dump_json(indent=2)
    for leftover in path.glob("*/.part-*.tmp"):  # of a run that was killed: a live one holds the lock
        leftover.unlink(missing_ok=True)
    write_whole(path / "store.json", lambda temporary: temporary.write_text(content + "\n"))


def read_info(path: Path) -> StoreInfo:
    """`store.json` of a complete store. Raises InputError where it is missing, damaged or of another format."""
    file = Path(path) / "store.json"
    try:
        content = json.loads(file.read_text())
        if (version := content["settings"]["format"]) == FORMAT:
            info = StoreInfo.model_validate(content)
    except FileNotFoundError as error:
        raise InputError(f"{path} is no complete feature store: no store.json. Run `featurize` to the end.") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(file, error) from error
    if version != FORMAT:
        raise InputError(
            f"{file} is of store format {version}; this version reads format {FORMAT}. "
            "Run `featurize` again, or use the version that made it."
        )
    if info.settings.key != info.key:
        raise InputError(
            f"{file} names key {info.key}, but its settings give {info.settings.key}: it was edited or its settings "
            "are another store's. Remove it and run `featurize` again."
        )
    if math.prod(info.grid) * info.channels > MOST_NUMBERS:
        raise damaged(file, ValueError(f"no photo has {info.channels} channels of {info.grid} tokens"))
    return info


def read_index(path: Path) -> pa.Table:
    """`index.parquet` of the store in `path`. Raises InputError where it is missing or damaged."""
    file = path / "index.parquet"
    try:
        table = pq.read_table(file, schema=_INDEX, memory_map=True)
        table.validate(full=True)
        if any(column.null_count for column in table.columns):
            raise ValueError("it has empty fields")
        ids = table["image_id"].to_numpy()
        if len(np.unique(ids)) != len(ids) or (table["row_group"].to_numpy() < 0).any():
            raise ValueError("an image stands in it twice, or nowhere in its shard")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(file, error) from error
    return table


class _Index:
    """Where each image lies, as sorted arrays: a dict of Python objects would take ten times the memory."""

    def __init__(self, table: pa.Table):
        order = np.argsort(table["image_id"].to_numpy())
        self._ids, self._shards, self._groups = (
            table[name].to_numpy()[order] for name in ("image_id", "shard", "row_group")
        )
        splits = table["split"].combine_chunks().dictionary_encode()
        self._splits, self._names = splits.indices.to_numpy()[order].astype(np.int8), splits.dictionary.to_pylist()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, image_id: int) -> tuple[str, int]:
        """(shard file, row group) of an image. Raises KeyError for one that is not there."""
        place = int(np.searchsorted(self._ids, image_id))
        if place == len(self._ids) or self._ids[place] != image_id:
            raise KeyError(image_id)
        return shard_file(self._names[self._splits[place]], int(self._shards[place])), int(self._groups[place])


class FeatureStore:
    """Reads one complete store. Cheap to pickle: files open lazily, once per process.

    Raises InputError from any member for a store that is incomplete, damaged or of another format.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        self._shards: dict[str, MappedShard] = {}
        self._datasets: dict[str, Dataset] = {}
        self._masks: dict[Path, SmallMasks] = {}
        self.buffers = Buffers()

    def __reduce__(self) -> tuple:
        return FeatureStore, (self.path,)

    # Two views of one store are equal, so that what is cached by store, pools of images for example, is cached once in
    # a process that opens the store for every trial, and keeps one of them alive.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureStore) and self.path == other.path and self.info == other.info

    def __hash__(self) -> int:
        return hash(self.path)

    @cached_property
    def info(self) -> StoreInfo:
        return read_info(self.path)

    @property
    def key(self) -> str:
        return self.info.key

    @cached_property
    def index(self) -> "_Index":
        """Where each image lies."""
        return _Index(read_index(self.path))

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

    def small_masks(self, split: str, size: tuple[int, int]) -> SmallMasks:
        """The masks of a split's annotations on a grid of `size`, drawn at first use; opened once per process."""
        file = self.path / f"masks-{split}-{size[0]}x{size[1]}.arrow"
        if file not in self._masks:
            self._masks[file] = SmallMasks(file, self.dataset(split), size)
        return self._masks[file]

    def read(self, image_id: int) -> np.ndarray:
        """(h, w, C) features of an image: float16, a read-only view of its shard; or float32, decoded from int8.

        Raises InputError for an id the store lacks.
        """
        if self.info.dtype == "int8":
            return self.read_batch([image_id])[0].numpy()
        return self._find(image_id, MappedShard.read)

    def read_batch(self, image_ids: Sequence[int]) -> torch.Tensor:
        """(n, h, w, C) features of `image_ids`, in their order, copied out: float16, or float32 decoded from int8."""
        if self.info.dtype == "float16":
            return self.read_encoded(image_ids)
        batch = torch.empty(len(image_ids), *self._shape)
        one = Quantised.empty(1, self._shape)  # again and again, so that it stays in the processor's cache
        for row, image_id in enumerate(image_ids):
            self._copy([image_id], one).decode(batch[row : row + 1])
        return batch

    def read_encoded(self, image_ids: Sequence[int]) -> torch.Tensor | Quantised:
        """The same as they are stored, for `.to(device)`, which decodes there."""
        if self.info.dtype == "float16":
            batch = self.buffers.empty(len(image_ids), *self._shape)
            views = [torch.from_numpy(self._find(image_id, MappedShard.read)) for image_id in image_ids]
            return torch.stack(views, out=batch) if views else batch  # one call, in which other threads run
        return self._copy(image_ids, Quantised.empty(len(image_ids), self._shape))

    def _copy(self, image_ids: Sequence[int], into: Quantised) -> Quantised:
        values, scales = into.values.numpy(), into.scales.numpy()
        for row, image_id in enumerate(image_ids):
            values[row], scales[row] = self._find(image_id, MappedShard.read_quantised)
        return into

    def _find(self, image_id: int, read: Callable[[MappedShard, int], T]) -> T:
        try:
            file, group = self.index[image_id]
        except KeyError as error:
            raise InputError(
                f"image {image_id} is not in the store {self.path} ({len(self.index)} images); it was skipped, or is "
                "of another data set. Make store and episodes from the same COCO folder."
            ) from error
        shard = self._shards.get(file)
        if shard is None:
            if file not in self.info.shards:
                raise damaged(self.path / "index.parquet", ValueError(f"{file!r:.60} is no shard of this store"))
            shard = self._shards[file] = MappedShard(self.path / file, self.key, self._shape, self.info.dtype)
        try:
            return read(shard, group)
        except IndexError as error:
            raise damaged(self.path / file, error) from error

    def verify(self) -> Iterator[str]:
        """Read every shard once and compare its checksum; yields each good shard's file, so progress shows."""
        for file in sorted(self.info.shards):
            self.check_shard(file)
            yield file

    def check_shard(self, file: str) -> ShardNote:
        """Read a shard whole; returns what it says of itself. Raises InputError unless its checksum is the store's."""
        return checked_shard(self.path / file, self.key, self.info.shards[file])

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        return (*self.info.grid, self.info.channels)
