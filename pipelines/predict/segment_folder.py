"""A folder of photos to masks: indexed PNG, overlays, and one COCO results file.

OUT/masks/NAME.png      labels 0 for the background and i + 1 for class i, with a palette
OUT/overlays/NAME.jpg   the photo with the mask and the names over it
OUT/results.json        COCO results: one RLE with its score for each class found on a photo
OUT/photos.json         their images and categories, as a COCO file, to read the results with
OUT/progress.jsonl      what is done, so that the same command goes on where it was stopped
"""

import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from la.data.photos import open_photo
from la.episodes.retrieval import descriptor
from la.errors import InputError
from la.predictor.checkpoint import read_checkpoint
from la.predictor.encoded_supports import Learned
from la.predictor.predictor import PHOTOS_AT_ONCE, Predictor
from la.predictor.support_set import SupportSet, merged, save_supports
from pipelines.config import PredictConfig
from pipelines.predict.mask_files import MOST_CLASSES, coco_results, indexed, overlay
from pipelines.predict.support_files import read_support_files, saved_classes
from pipelines.workspace import digest, locked, write_text, write_whole

LEARNED_KEPT = 64  # sets of nearest supports in memory; neighbouring photos often share theirs


@dataclass(frozen=True)
class PredictReport:
    """What a run did: photos by what became of them, photos per second, and where the results are."""

    made: int
    already: int
    skipped: dict[str, str]  # file name -> reason
    photos_per_second: float
    classes: tuple[str, ...]
    results: Path


def predict(config: PredictConfig, on_progress: Callable[[int, int, float], None] | None = None) -> PredictReport:
    """Segment every photo; `on_progress` gets (photos done, of all, a second). Photos that cannot be used are left out.

    Raises InputError for a checkpoint, weights or supports that cannot be used, for a folder without photos, and where
    not a single photo can be used.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.support_selection == "nearest" and config.shots is None:
        raise InputError("--support-selection nearest needs --shots K: how many supports of each class to take.")
    photos = find_photos(config.images)
    checkpoint = read_checkpoint(config.checkpoint)
    saved = saved_classes(config.prototypes, checkpoint)
    predictor = Predictor.from_checkpoint(checkpoint, config.device, config.weights, config.backbone, config.image_size)
    supports, category_ids = _supports(config, predictor, saved)
    learned_of = _chooser(config, predictor, supports)
    with locked(config.out, wait=False):
        ledger = _Ledger(config.out / "progress.jsonl", _key(config, predictor, supports))
        todo = [photo for photo in photos if not ledger.has(photo)]
        skipped: dict[str, str] = {}
        started, already = time.perf_counter(), len(photos) - len(todo)
        for start in range(0, len(todo), PHOTOS_AT_ONCE):
            some = todo[start : start + PHOTOS_AT_ONCE]
            for photo, image, mask, scores in _segmented(some, predictor, learned_of, skipped):
                _write(config.out, photos[photo].name, image, mask, supports.classes)
                ledger.add(photo, mask.shape, coco_results(mask, scores, list(category_ids.values())))
            if on_progress:
                done = start + len(some)
                on_progress(already + done, len(photos), done / (time.perf_counter() - started))
        seconds = time.perf_counter() - started
        if len(skipped) == len(photos):
            raise InputError(f"--images {config.images}: no photo could be used. {next(iter(skipped.values()))}")
        results = _finish(config.out, photos, ledger, category_ids)
    made = len(todo) - len(skipped)
    return PredictReport(made, already, skipped, made / seconds, supports.classes, results)


class _Photo(NamedTuple):
    id: int  # in the results
    name: str  # of its files


def find_photos(source: Path) -> dict[Path, _Photo]:
    """The photos of a folder by name, or one photo. Ids are the numbers they are named by, as COCO's are, or follow."""
    Image.init()
    known = Image.registered_extensions()
    paths = [source] if source.is_file() else sorted(p for p in source.glob("*") if p.suffix.lower() in known)
    if not paths:
        found = "has no photo" if source.is_dir() else "is not there"
        raise InputError(f"--images {source} {found}. Pass a folder with JPEG or PNG photos, or one photo.")
    stems = [path.stem for path in paths]
    numbers = {path: int(path.stem) for path in paths if path.stem.isascii() and path.stem.isdigit()}
    numbers = numbers if len(set(numbers.values())) == len(numbers) else {}
    free = itertools.count(max(numbers.values(), default=0) + 1)
    return {
        path: _Photo(numbers.get(path) or next(free), path.stem if stems.count(path.stem) == 1 else path.name)
        for path in paths
    }


def _supports(
    config: PredictConfig, predictor: Predictor, saved: Sequence[SupportSet]
) -> tuple[SupportSet, dict[str, int]]:
    """The supports, and class name -> category id of the results in the order of classes."""
    sets, given = list(saved), {}
    if config.support is not None:
        read = read_support_files(config.support, config.classes or None, config.support_images)
        given = read.category_ids
        sets.append(predictor.read_supports(read.photos, read.prompts))
    if not sets:
        raise InputError("nothing says what to segment: pass --support FILE or --prototypes FILE.")
    supports = merged(sets)
    if len(supports.classes) > MOST_CLASSES:
        raise InputError(
            f"there are {len(supports.classes)} classes; the palette of a PNG has colours for {MOST_CLASSES}. Choose "
            "some with --classes."
        )
    if config.save_prototypes:
        write_whole(config.save_prototypes, lambda temporary: save_supports(temporary, supports))
    free = (i for i in itertools.count(1) if i not in given.values())
    return supports, {name: given[name] if name in given else next(free) for name in supports.classes}


def _chooser(config: PredictConfig, predictor: Predictor, supports: SupportSet) -> Callable[[Tensor], Learned]:
    """From the features (h, w, Dv) of a query to what the model knows for it."""
    learn = lru_cache(LEARNED_KEPT)(lambda positions: predictor.learn(supports.only(positions)))
    if config.support_selection == "random":
        chance = random.Random(f"supports/{config.seed}")
        chosen = _of_each(supports, lambda showing: sorted(showing, key=lambda _: chance.random())[: config.shots])
        learned = learn(tuple(sorted(chosen)))
        return lambda features: learned
    index = supports.index()

    def nearest(features: Tensor) -> Learned:
        query = descriptor(features[None].cpu())[0]
        return learn(tuple(sorted(_of_each(supports, lambda some: index.nearest(query, config.shots, some)))))

    return nearest


def _of_each(supports: SupportSet, choose: Callable[[list[int]], list[int]]) -> set[int]:
    """Positions chosen of each class's photos; a photo of several classes serves all of them."""
    return {at for name in supports.classes for at in choose(supports.showing(name))}


def _segmented(
    paths: Sequence[Path], predictor: Predictor, learned_of: Callable[[Tensor], Learned], skipped: dict[str, str]
) -> Iterator[tuple[Path, Image.Image, np.ndarray, np.ndarray]]:
    opened = {}
    for path in paths:
        try:
            opened[path] = open_photo(path)
        except InputError as error:
            skipped[path.name] = str(error)
    if not opened:
        return
    for (path, photo), features in zip(opened.items(), predictor.encode(list(opened.values())), strict=True):
        size = [(photo.height, photo.width)]
        masks, scores = predictor.segment_features(features[None], size, learned_of(features))
        yield path, photo, masks[0], scores[0]


def _write(out: Path, name: str, photo: Image.Image, mask: np.ndarray, classes: Sequence[str]) -> None:
    shown = overlay(photo, mask, classes)
    write_whole(out / "masks" / f"{name}.png", lambda temporary: indexed(mask).save(temporary, "PNG"))
    write_whole(out / "overlays" / f"{name}.jpg", lambda temporary: shown.save(temporary, "JPEG", quality=90))


class _Ledger:
    """What is done, one line a photo under a first line that says with which settings; another key starts anew."""

    def __init__(self, path: Path, key: str):
        self.done: dict[str, dict] = {}
        head = json.dumps({"key": key})
        first, *lines = (path.read_text().splitlines() if path.is_file() else []) or [head]
        for line in lines if first == head else ():
            with suppress(ValueError):  # the line that was being written when the process was killed
                entry = json.loads(line)
                self.done[entry["photo"]] = entry
        write_text(path, "\n".join([head, *map(json.dumps, self.done.values()), ""]))
        self._path = path

    def has(self, photo: Path) -> bool:
        return self.done.get(photo.name, {}).get("version") == _version(photo)

    def add(self, photo: Path, size: tuple[int, ...], results: list[dict]) -> None:
        entry = {"photo": photo.name, "version": _version(photo), "size": size, "results": results}
        self.done[photo.name] = entry
        with open(self._path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def _version(photo: Path) -> list[int]:
    found = photo.stat()
    return [found.st_size, found.st_mtime_ns]


def _finish(out: Path, photos: dict[Path, _Photo], ledger: _Ledger, category_ids: dict[str, int]) -> Path:
    done = [(photo, ledger.done[path.name], path) for path, photo in photos.items() if ledger.has(path)]
    images = [
        {"id": photo.id, "file_name": path.name, "height": entry["size"][0], "width": entry["size"][1]}
        for photo, entry, path in done
    ]
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    about = {"info": {}, "images": images, "annotations": [], "categories": categories}
    write_text(out / "photos.json", json.dumps(about))
    results = [{"image_id": photo.id, **one} for photo, entry, _ in done for one in entry["results"]]
    write_text(out / "results.json", json.dumps(results))
    return out / "results.json"


def _key(config: PredictConfig, predictor: Predictor, supports: SupportSet) -> str:
    """Digest of all that decides the results of a photo."""
    content = hashlib.sha256()
    for support in supports.supports:
        content.update(support.features.numpy().tobytes())
        for name, one in support.shown.items():
            content.update(repr((name, one.points, one.boxes)).encode())
            content.update(b"" if one.mask is None else one.mask.numpy().tobytes())
    chosen = (config.support_selection, config.shots, config.seed)
    return digest([predictor.made_by, supports.classes, content.hexdigest(), chosen])
