"""A second store from a finished one, with its features in another dtype; photos and backbone are not needed."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from la.data.coco import Image
from la.errors import InputError
from pipelines.store.feature_shards import ShardNote, StoreSettings, open_shard, write_shard
from pipelines.store.reader import FeatureStore, StoreInfo, read_info, write_info
from pipelines.workspace import Workspace, locked, write_whole


@dataclass(frozen=True)
class ConvertReport:
    """The store made, how many shards were made now and before, and its feature bytes over those it was made from."""

    store: Path
    made: int
    already: int
    share: float


def convert(
    workspace: Path, store: str | None = None, dtype: str = "int8", on_shard: Callable[[int, int], None] | None = None
) -> ConvertReport:
    """Make the store of the same features in `dtype`; `on_shard` gets (shards done, of all).

    Equal, bit for bit, to what `featurize --dtype` makes. A run that was stopped goes on where it was. Raises
    InputError for a store that is missing, ambiguous or damaged, for a dtype that it cannot be turned into, and where
    another process writes the new store.
    """
    source = FeatureStore(plain_store(Workspace(workspace), store))
    if (source.info.dtype, dtype) != ("float16", "int8"):
        raise InputError(
            f"--dtype {dtype}: store {source.key} holds {source.info.dtype}; only float16 is converted, and to int8."
        )
    settings = source.info.settings.model_copy(update={"dtype": dtype})
    path = source.path.parent / settings.key
    if (path / "store.json").exists():
        return ConvertReport(path, 0, len(read_info(path).shards), _bytes(path) / _bytes(source.path))
    with locked(path, wait=False):
        checksums, made = {}, 0
        for done, file in enumerate(sorted(source.info.shards), start=1):
            if (path / file).exists():
                checksums[file] = open_shard(path / file, settings.key)[1].features_sha256
            else:
                checksums[file] = _convert_shard(source, file, settings, path / file).features_sha256
                made += 1
            if on_shard:
                on_shard(done, len(source.info.shards))
        for name in ("index.parquet", *(f"annotations-{split}.parquet" for split in source.info.splits)):
            write_whole(path / name, partial(shutil.copyfile, source.path / name))
        info = source.info.model_copy(update={"key": settings.key, "settings": settings, "shards": checksums})
        write_info(path, StoreInfo.model_validate(info.model_dump()))
    return ConvertReport(path, made, len(checksums) - made, _bytes(path) / _bytes(source.path))


def plain_store(workspace: Workspace, key: str | None) -> Path:
    """The store named, or the only one that is not int8. Raises InputError as `Workspace.find_store` does."""
    plain = [path.parent for path in workspace.features.glob("*/store.json") if read_info(path.parent).dtype != "int8"]
    return plain[0] if key is None and len(plain) == 1 else workspace.find_store(key)


def _convert_shard(source: FeatureStore, file: str, settings: StoreSettings, path: Path) -> ShardNote:
    note = source.check_shard(file)  # damage must not be carried over under a new, matching checksum
    images = source.dataset(note.split).images

    def rows() -> Iterator[tuple[Image, np.ndarray]]:
        for image_id in note.image_ids:
            if image_id in images:
                yield images[image_id], source.read(image_id)

    return write_shard(path, settings, note.model_copy(update={"key": settings.key}), rows())


def _bytes(store: Path) -> int:
    return sum(file.stat().st_size for file in store.glob("*/part-*.parquet"))
