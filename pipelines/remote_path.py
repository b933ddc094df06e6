"""Files to read from where users have them: this machine's disks, or a URI of any filesystem of pyarrow.

Such as s3://bucket/folder or gs://bucket/folder. An S3 server of one's own is named in the URI,
s3://bucket/folder?endpoint_override=host:9000&scheme=http, or by AWS_ENDPOINT_URL; credentials are those that its
tools use, from the environment or ~/.aws.
"""

import io
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import PlainSerializer, PlainValidator

from la.errors import InputError

if TYPE_CHECKING:  # a second to import, which verbs without a URI need not wait for
    from pyarrow import fs

T = TypeVar("T")
log = logging.getLogger(__name__)
PATIENCE = 300.0  # seconds that a server may fail before it counts as down
LONGEST_PAUSE = 20.0  # seconds


class Unreachable(InputError):
    """A server does not answer, or refuses: what was asked for may well be fine."""


def filesystem(uri: str, patience: float | None = None) -> "tuple[fs.FileSystem, str]":
    """The filesystem of a URI and the path in it. Raises InputError for one that pyarrow does not know."""
    if "@" in uri.split("://")[-1].split("/")[0]:
        raise InputError(
            f"{uri.split('://')[0]}://...@... holds a password, which would be written down with the features. Leave "
            "it out: credentials come from the environment or ~/.aws."
        )
    if re.fullmatch(r"\w+:/*", uri):
        raise InputError(f"{uri} names no bucket or folder. Expected one such as s3://bucket/folder.")
    import pyarrow as pa
    from pyarrow import fs

    try:
        return patiently(uri, lambda: fs.FileSystem.from_uri(uri), patience)  # it may ask for a bucket's region
    except InputError:  # which is a ValueError
        raise
    except (ValueError, pa.ArrowException) as error:
        raise InputError(
            f"{uri} is no folder that pyarrow can reach ({error!s:.200}). Expected s3://, gs:// or file:///."
        ) from error


def patiently(uri: str, call: Callable[[], T], patience: float | None = None) -> T:
    """`call`, again and again while the server fails; raises Unreachable for other mistakes at once.

    `patience` in seconds, by default PATIENCE.
    """
    until, pause = time.monotonic() + (PATIENCE if patience is None else patience), 0.5
    while True:
        try:
            return call()
        except (FileNotFoundError, PermissionError) as error:
            raise Unreachable(f"{uri}: {error!s:.300}") from error
        except OSError as error:
            refused = any(word in str(error) for word in ("ACCESS_DENIED", "NO_SUCH_BUCKET", "not found"))
            if refused or time.monotonic() + pause > until:
                raise Unreachable(
                    f"{uri} does not work ({error!s:.300}). Fix it, then the same command goes on."
                ) from error
            if pause > 3:
                log.warning("%s does not work (%.100s); trying again", uri, error)
        time.sleep(pause * random.uniform(0.5, 1.0))  # workers that fail together do not come back together
        pause = min(2 * pause, LONGEST_PAUSE)


class RemotePath:
    """A file or folder of a URI, with those methods of Path that reading needs.

    Errors of its server are waited out, see PATIENCE; then, and for what is not there, Unreachable is raised.
    """

    def __init__(self, uri: str):
        self._place, mark, query = uri.partition("?")
        self._place = self._place.rstrip("/")
        self._query = mark + query
        if "://" not in self._place:
            raise InputError(
                f"{uri} names no folder. Expected s3://bucket/folder, gs://bucket/folder or file:///folder."
            )
        self.name = self._place.rsplit("/", 1)[-1]
        self.stem = self.name.rsplit(".", 1)[0]

    @cached_property
    def _there(self) -> "tuple[fs.FileSystem, str]":
        return filesystem(str(self))

    def __str__(self) -> str:
        return self._place + self._query

    def __truediv__(self, name: str) -> "RemotePath":
        files, path = self._there  # connected once; and names in it need not be what a URI may hold
        below = RemotePath(f"{self._place}/{name}{self._query}")
        below.name, below.stem = name, name.rsplit(".", 1)[0]
        below._there = (files, f"{path}/{name}")
        return below

    def absolute(self) -> "RemotePath":
        """Itself."""
        return self

    def is_dir(self) -> bool:
        """Whether it is a folder, or on object storage the beginning of some file's name."""
        files, path = self._there
        return patiently(str(self), lambda: files.get_file_info(path)).type.name == "Directory"

    def iterdir(self) -> Iterator["RemotePath"]:
        """What is in the folder, in no order."""
        for info in self._listed():
            yield self / info.base_name

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """What is in the folder under names of this pattern."""
        return (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def file_names(self) -> set[str]:
        """Names of the files in the folder."""
        return {info.base_name for info in self._listed() if info.is_file}

    def read_bytes(self) -> bytes:
        """Its content."""
        files, path = self._there

        def read() -> bytes:
            with files.open_input_stream(path) as stream:
                return stream.read()

        return patiently(str(self), read)

    def read_text(self) -> str:
        """Its content."""
        return self.read_bytes().decode()

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Its content, read whole."""
        return io.BytesIO(self.read_bytes())

    def _listed(self) -> "list[fs.FileInfo]":
        from pyarrow import fs

        files, path = self._there
        selector = fs.FileSelector(path, allow_not_found=True)
        return patiently(str(self), lambda: files.get_file_info(selector))


def path_or_uri(where: "str | Path | RemotePath") -> "Path | RemotePath":
    """A path of this machine as it is, and a URI as RemotePath."""
    if isinstance(where, str) and "://" in where:
        return Path(where.removeprefix("file://")) if where.startswith("file:///") else RemotePath(where)
    return where if isinstance(where, RemotePath) else Path(where)


PathOrUri = Annotated[Path | RemotePath, PlainValidator(path_or_uri), PlainSerializer(str, return_type=str)]
