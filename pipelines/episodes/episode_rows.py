"""What an episode shard and its manifest hold, and whether they may be used: they, too, may come from anywhere."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from la.data.coco import Dataset
from la.episodes.sampling import Episode, Pair
from la.errors import InputError

FORMAT = 1
SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "classes": pa.list_(pa.int32()),
        "query": pa.int64(),
        "supports": pa.list_(pa.int64()),
        "pairs": pa.list_(
            pa.struct(
                {
                    "support": pa.int16(),
                    "slot": pa.int16(),
                    "masks": pa.list_(pa.int64()),
                    "points": pa.list_(pa.list_(pa.float32())),
                    "boxes": pa.list_(pa.list_(pa.float32())),
                }
            )
        ),
    }
)
Whole = Annotated[int, Field(strict=True)]


class _Manifest(BaseModel):
    format: Literal[1]  # FORMAT
    plan: dict
    episodes: Whole
    classes_drawn: list[Whole]
    classes_skipped: dict[int, str]
    digest: str = Field(pattern="^[0-9a-f]{16}$")


def read_manifest(folder: Path, plan: dict, dataset: Dataset) -> dict:
    """`manifest.json` of a folder of shards.

    Raises InputError where it is missing, damaged or of another plan or data set than these.
    """
    file = folder / "manifest.json"
    try:
        content = json.loads(file.read_bytes())
        manifest = _Manifest.model_validate(content)
        expect(manifest.plan == json.loads(json.dumps(plan)), "its plan is not the one that was asked for")
        expect(
            {*manifest.classes_drawn, *manifest.classes_skipped} <= dataset.categories.keys(),
            "it names classes that the store's data set lacks",
        )
    except (OSError, ValueError, RecursionError) as error:
        raise damaged_episodes(file, error) from error
    return content


def open_part(path: Path) -> pq.ParquetFile:
    """Raises InputError where it is missing, damaged or no part of an episode shard."""
    try:
        file = pq.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
        expect(file.schema_arrow.equals(SCHEMA), "its columns are not those of episodes")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged_episodes(path, error) from error
    return file


def rows_of_part(path: Path, file: pq.ParquetFile) -> Iterator[list[dict]]:
    """The rows, some at a time. Raises InputError where they cannot be read."""
    try:
        for rows in file.iter_batches(batch_size=256, use_threads=False):
            yield rows.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged_episodes(path, error) from error


def rows_of_group(path: Path, file: pq.ParquetFile, group: int, size: int) -> list[dict]:
    """The rows of one row group, which are `size`. Raises InputError where they are not or cannot be read."""
    try:
        expect(group < file.num_row_groups, f"it has {file.num_row_groups} batches; batch {group} is not there")
        rows = file.read_row_group(group, use_threads=False).to_pylist()
        expect(len(rows) == size, f"batch {group} has {len(rows)} episodes, not {size}")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged_episodes(path, error) from error
    return rows


def digest_of_part(path: Path) -> str:
    """What a part says its content is. Raises as `open_part` does."""
    digest = (open_part(path).schema_arrow.metadata or {}).get(b"digest", b"")
    if len(digest) != 64:
        raise damaged_episodes(path, "it says nothing of its content's digest")
    return digest.decode("ascii", "replace")


def to_episode(path: Path, row: dict, dataset: Dataset) -> Episode:
    """The episode of a row, whose images, classes and annotations `dataset` has. Raises InputError where it has not."""
    try:
        pairs = tuple(
            Pair(
                p["support"],
                p["slot"],
                tuple(p["masks"]),
                tuple((x, y, int(label)) for x, y, label in p["points"]),
                tuple(tuple(box) for box in p["boxes"]),
            )
            for p in row["pairs"]
        )
        episode = Episode(row["index"], tuple(row["classes"]), row["query"], tuple(row["supports"]), pairs)
        _check(episode, dataset)
    except (ValueError, TypeError, OverflowError) as error:  # of values that are missing or not finite, too
        raise damaged_episodes(path, f"episode {row['index']}: {error}") from error
    return episode


def _check(episode: Episode, dataset: Dataset) -> None:
    expect(episode.index is not None, "it has no index")
    expect(bool(episode.classes and episode.supports), "it has no classes or no supports")
    expect(len(set(episode.classes)) == len(episode.classes), "it names a class twice")
    for category in episode.classes:
        expect(category in dataset.categories, f"class {category} is not in the store's data set")
    for image in (episode.query, *episode.supports):
        expect(image in dataset.images, f"image {image} is not in the store's data set")
    places = {(p.support, p.slot) for p in episode.pairs}
    expect(len(places) == len(episode.pairs), "it has two pairs of one support and one class")
    for pair in episode.pairs:
        inside = 0 <= pair.support < len(episode.supports) and 0 <= pair.slot < len(episode.classes)
        expect(inside, f"its pair ({pair.support}, {pair.slot}) has no support or no class")
        own = {one.id for one in dataset.annotations[episode.supports[pair.support]]} if pair.masks else set()
        expect(own.issuperset(pair.masks), f"its masks {pair.masks!s:.60} are not of their support")
        expect(all(label in (0, 1) for _, _, label in pair.points), "a point's label is not 0 or 1")
        expect(all(len(box) == 4 for box in pair.boxes), "a box has not four sides")
        numbers = [v for shape in (*pair.points, *pair.boxes) for v in shape]
        expect(all(map(math.isfinite, numbers)), "a coordinate is not finite")


def expect(holds: bool, told: str) -> None:
    """Raises ValueError with what was found unless it holds."""
    if not holds:
        raise ValueError(told)


def damaged_episodes(path: Path, error: object) -> InputError:
    """The error for a file of episodes that cannot be used."""
    kind = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return InputError(
        f"{path} is missing, damaged or not of this store's episodes ({kind}{error!s:.160}). Remove {path.parent} and "
        "run the same command again, which draws them anew."
    )
