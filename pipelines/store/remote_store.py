"""Feature stores on object storage: any filesystem of pyarrow, named by a URI as `pipelines.remote_path` has them."""

import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from la.errors import InputError
from pipelines.remote_path import Unreachable, filesystem, patiently
from pipelines.store.feature_shards import checked_shard, open_shard
from pipelines.store.reader import StoreInfo, read_info
from pipelines.workspace import write_whole

T = TypeVar("T")
OnFile = Callable[[int, int], None]  # (files done, of all)
CHUNK = 8 << 20  # bytes copied at once
_SHARD = re.compile(r"(train|val)/part-\d{5,9}\.parquet")
PUTS_WHOLE = ("s3", "gcs")  # filesystems where a file appears when its writing ends, and not before


class RemoteStores:
    """The folder of a URI that holds feature stores, one folder each by its key, as a workspace's `features/` does.

    A server's errors are waited out, see PATIENCE. Raises InputError for a URI that cannot be used.
    """

    def __init__(self, uri: str, patience: float | None = None):
        self.uri = uri
        self._patience = patience
        self._fs, self._root = filesystem(uri, patience)

    def put(self, store: Path, file: str) -> None:
        """Copy a file of a local store there, whole or not at all."""
        self._patiently(lambda: self._put(store / file, f"{self._root}/{store.name}/{file}"))

    def push(self, store: Path, on_file: OnFile = lambda *_: None) -> int:
        """Copy a finished store there, store.json last; returns how many files were not there yet, or others."""
        info = read_info(store)
        files = files_of(info)
        there = self._sizes(store.name)
        finished = "store.json" in there and _equal(info, lambda: self._info(store.name))
        missing = [file for file in files if not self._holds(store, file, there.get(file), finished)]
        if "store.json" in there and not finished:  # of another run: no finished store while its files are replaced
            self._patiently(lambda: self._remove(f"{self._root}/{store.name}/store.json"))
        for done, file in enumerate(missing, start=len(files) - len(missing) + 1):
            self.put(store, file)
            on_file(done, len(files))
        return len(missing)

    def pull(self, features: Path, key: str | None = None, on_file: OnFile = lambda *_: None) -> Path:
        """Copy a finished store into the local folder `features`, every shard checked; returns the store's folder.

        Shards that are here already stay where they are the store's. Raises InputError where there is no store, or
        several and none was named.
        """
        key = key or self.only_key()
        info = self._info(key)
        if not _equal(info, lambda: read_info(features / key)):  # no finished store while its files are replaced
            (features / key / "store.json").unlink(missing_ok=True)
        files = files_of(info)
        for done, file in enumerate(files, start=1):
            self._fetch(key, file, features / key / file, info)
            on_file(done, len(files))
        return features / key

    def pull_unfinished(self, store: Path) -> None:
        """Copy the shards that an earlier run left of a store, each checked, or all of it where it is finished.

        A store that is finished here stays as it is. Where neither is, so do the shards that are here: the run that
        goes on checks and describes them itself.
        """
        if (store / "store.json").exists():
            return
        there = self._sizes(store.name)
        if "store.json" in there:
            self.pull(store.parent, store.name)
            return
        for file in sorted(there):
            if _SHARD.fullmatch(file) and not (store / file).exists():
                self._fetch(store.name, file, store / file)

    def _info(self, key: str) -> StoreInfo:
        with tempfile.TemporaryDirectory() as folder:
            self._fetch(key, "store.json", Path(folder) / "store.json")
            info = read_info(Path(folder))
        if info.key != key:
            raise InputError(f"{self.uri}: the store {key} calls itself {info.key}. Push it again.")
        return info

    def only_key(self) -> str:
        """The key of the only finished store there. Raises InputError where there is none, or several."""
        keys = sorted({name.split("/")[0] for name in self._sizes("") if name.endswith("/store.json")})
        if len(keys) != 1:
            raise InputError(f"{self.uri} holds {', '.join(keys) or 'no finished store'}; name one with --store.")
        return keys[0]

    def _fetch(self, key: str, file: str, path: Path, info: StoreInfo | None = None) -> None:
        """Copy a file here, whole or not at all; a shard only if its checksum is that of `info`, or else its own."""
        if info and _SHARD.fullmatch(file):
            with suppress(InputError):  # missing, damaged or of another run
                checked_shard(path, key, info.shards[file])
                return

        def write(temporary: Path) -> None:
            self._patiently(lambda: self._get(f"{self._root}/{key}/{file}", temporary))
            if not _SHARD.fullmatch(file):
                return
            try:
                expected = info.shards[file] if info else open_shard(temporary, key)[1].features_sha256
                checked_shard(temporary, key, expected)
            except InputError as error:
                raise InputError(
                    f"{file} of store {key} at {self.uri} is damaged ({error!s:.200}). Remove it there and push again."
                ) from error

        write_whole(path, write)

    def _get(self, source: str, path: Path) -> None:
        with self._fs.open_input_stream(source) as stream, open(path, "wb") as out:
            shutil.copyfileobj(stream, out, CHUNK)

    def _put(self, path: Path, target: str) -> None:
        folder, name = target.rsplit("/", 1)
        self._fs.create_dir(folder, recursive=True)
        written = target if self._fs.type_name in PUTS_WHOLE else f"{folder}/.{name}.tmp"
        with open(path, "rb") as file:
            try:
                with self._fs.open_output_stream(written) as stream:
                    shutil.copyfileobj(file, stream, CHUNK)
            except BaseException:  # closing the stream makes a file even of what was cut short
                with suppress(OSError):
                    self._remove(written)
                raise
        if written != target:
            self._fs.move(written, target)

    def _holds(self, store: Path, file: str, size: int | None, finished: bool) -> bool:
        """Whether a file there, of `size` bytes, is the store's own; `finished` says that store.json there is.

        Of shards the footers are compared, which hold the checksum of the features.
        """
        path = store / file
        if not _SHARD.fullmatch(file):
            return finished and size == path.stat().st_size
        footer = open_shard(path, store.name)[0].metadata.serialized_size + 8  # bytes, with its length and mark
        whole = path.stat().st_size

        def same() -> bool:
            with open(path, "rb") as here, self._fs.open_input_file(f"{self._root}/{store.name}/{file}") as there:
                here.seek(whole - footer)
                return here.read() == there.read_at(footer, whole - footer)

        return size == whole and self._patiently(same)

    def _remove(self, target: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.delete_file(target)

    def _sizes(self, folder: str) -> dict[str, int]:
        """Path under `folder` -> bytes, of every file there."""
        top = f"{self._root}/{folder}".rstrip("/")
        selector = fs.FileSelector(top, recursive=True, allow_not_found=True)
        found = self._patiently(lambda: self._fs.get_file_info(selector))
        return {one.path.removeprefix(top + "/"): one.size for one in found if one.type == fs.FileType.File}

    def _patiently(self, call: Callable[[], T]) -> T:
        return patiently(self.uri, call, self._patience)


def files_of(info: StoreInfo) -> list[str]:
    """Every file of a finished store; store.json, which makes it finished, last."""
    return [*sorted(info.shards), *(f"annotations-{s}.parquet" for s in info.splits), "index.parquet", "store.json"]


def _equal(info: StoreInfo, read: Callable[[], StoreInfo]) -> bool:
    try:
        return read() == info
    except Unreachable:
        raise
    except InputError:  # missing or damaged
        return False
