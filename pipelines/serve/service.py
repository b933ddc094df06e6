"""One model, one thread that uses it, a queue before that, and what users hand in, checked before it is decoded.

Everything that takes the model or decodes a photo is a job of the queue, so that memory holds one decoded photo at a
time however many users there are. Nothing of one user is kept in `Predictor`: each has a `ClassSet` of his own.
"""

import asyncio
import io
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from la.backbone import PHOTO_FORMATS
from la.errors import InputError
from la.learned import Learned
from la.photos import open_photo
from la.predictor import PhotoPrompts, Predictor
from la.support_set import Support, SupportSet
from pipelines.config import ServeConfig

T = TypeVar("T")
MB = 1_000_000  # bytes
NAME_LENGTH = 80  # characters of a file's or a class's name that are kept
MOST_LEFT_OUT = 6  # supports up to which the result is computed again without each of them


class Refused(InputError):
    """What is not done for a user: HTTP status, a code for programs, the field at fault or None, and the message."""

    def __init__(self, status: int, code: str, field: str | None, message: str):
        super().__init__(message)
        self.status, self.code, self.field = status, code, field


class Timed(NamedTuple):
    """What a job returned, and how many seconds it ran and waited before."""

    value: object
    seconds: float
    queue_seconds: float


class ModelQueue:
    """Jobs one after the other on one thread, in the order they came."""

    def __init__(self, max_waiting: int):
        self.max_waiting, self.waiting = max_waiting, 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "model")

    async def run(self, job: Callable[..., T], *args: object) -> Timed:
        """Raises Refused (503) where too many wait already, and what the job raises."""
        with self._lock:
            if self.waiting >= self.max_waiting:
                raise Refused(503, "busy", None, f"{self.waiting} requests wait for the model; try again in a while.")
            self.waiting += 1
        came = time.perf_counter()

        def timed() -> Timed:
            started = time.perf_counter()
            value = job(*args)
            return Timed(value, time.perf_counter() - started, started - came)

        future = self._thread.submit(timed)
        future.add_done_callback(self._one_done)  # also where the user went away and the job never ran
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Start no further job."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _one_done(self, _: object) -> None:
        with self._lock:
            self.waiting -= 1


@dataclass(frozen=True)
class Upload:
    """A photo as it was handed in: its name, made harmless, and its bytes. `field` names it in messages."""

    name: str
    data: bytes
    field: str


@dataclass(frozen=True)
class ClassSet:
    """Classes somebody showed: label i + 1 of masks is `supports.classes[i]`."""

    supports: SupportSet
    learned: Learned


class Segmentation(NamedTuple):
    """Of one photo: mask (H, W) of labels, scores (N,), and features (1, h, w, Dv) to look at it again."""

    mask: np.ndarray
    scores: np.ndarray
    features: torch.Tensor


class Service:
    """The model and its limits. All methods but `receive` are jobs, to be run by `queue`."""

    def __init__(self, config: ServeConfig, predictor: Predictor | None = None):
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.predictor = predictor or Predictor.from_checkpoint(
            config.checkpoint, config.device, config.weights, config.backbone, config.image_size
        )
        self.queue = ModelQueue(config.max_waiting)
        self.class_sets = ClassSets(config.max_class_sets, 60 * config.idle_minutes)

    def receive(self, name: str | None, data: bytes, field: str) -> Upload:
        """Raises Refused (413) for too many bytes, before anything looks at them."""
        if len(data) > self.config.max_photo_mb * MB:
            raise Refused(
                413,
                "photo_too_large",
                field,
                f"{clean_name(name)} has more than {self.config.max_photo_mb} MB, the most that is taken. Scale it "
                "down.",
            )
        return Upload(clean_name(name), data, field)

    def decode(self, upload: Upload) -> Image.Image:
        """RGB, upright. Raises Refused: 413 for too many pixels, known before decoding; 422 for what is no photo."""
        try:
            opened = Image.open(io.BytesIO(upload.data), formats=PHOTO_FORMATS)
            width, height = opened.size
        except Image.DecompressionBombError as error:
            raise self._too_many_pixels(upload, "far more pixels") from error
        except Exception as error:  # the decoders answer damaged files with errors of many kinds
            raise Refused(
                422,
                "not_a_photo",
                upload.field,
                f"{upload.name} is not a photo; expected a whole JPEG, PNG, WebP or BMP.",
            ) from error
        if width * height > self.config.max_photo_pixels:
            raise self._too_many_pixels(upload, f"{width}x{height} pixels")
        try:
            photo = open_photo(opened)
        except Exception as error:
            raise Refused(
                422, "not_a_photo", upload.field, f"{upload.name} is cut off or damaged ({error!s:.80}). Save it anew."
            ) from error
        photo.filename = upload.name  # what messages about prompts call it
        return photo

    def read_support(self, upload: Upload, prompts: PhotoPrompts) -> Support:
        """One annotated photo. Raises InputError for prompts that cannot be used, and as `decode`."""
        return self.predictor.read_supports([self.decode(upload)], [prompts]).supports[0]

    def learn(self, supports: Sequence[Support], classes: Sequence[str] = ()) -> ClassSet:
        """Raises InputError as `Predictor.learn` and SupportSet."""
        found = SupportSet(tuple(supports), self.predictor.made_by, tuple(classes))
        return ClassSet(found, self.predictor.learn(found))

    def show(self, uploads: Sequence[Upload], prompts: Sequence[PhotoPrompts], classes: Sequence[str]) -> ClassSet:
        """Photos with their prompts to a class set. Raises as `read_support` and `learn`."""
        return self.learn([self.read_support(u, p) for u, p in zip(uploads, prompts, strict=True)], classes)

    def segment(self, class_set: ClassSet, upload: Upload) -> Segmentation:
        """Raises Refused as `decode`."""
        photo = self.decode(upload)
        features = self.predictor.encode([photo])
        found = self.predictor.segment_features(features, [(photo.height, photo.width)], class_set.learned)
        return Segmentation(found.masks[0], found.scores[0], features.cpu())

    def moved(self, class_set: ClassSet, found: Segmentation) -> list[float] | None:
        """How much each support moves a result: of the pixels that have a class with it or without it, the share whose
        class is another without it. None for more than MOST_LEFT_OUT supports."""
        supports = class_set.supports
        count = len(supports.supports)
        if count > MOST_LEFT_OUT:
            return None
        return [_changed(found.mask, self._without(supports, left_out, found)) for left_out in range(count)]

    def _without(self, supports: SupportSet, left_out: int, found: Segmentation) -> np.ndarray:
        """The mask without one support, in the labels of all classes; a class that only it shows has no pixels."""
        kept = tuple(one for at, one in enumerate(supports.supports) if at != left_out)
        if not kept:
            return np.zeros_like(found.mask)
        shown = tuple(name for name in supports.classes if any(name in one.shown for one in kept))
        learned = self.predictor.learn(replace(supports, supports=kept, classes=shown))
        mask = self.predictor.segment_features(found.features, [found.mask.shape], learned).masks[0]
        labels = np.array([0, *(supports.classes.index(name) + 1 for name in shown)], found.mask.dtype)
        return labels[mask]

    def _too_many_pixels(self, upload: Upload, found: str) -> Refused:
        most = self.config.max_photo_pixels
        message = f"{upload.name} has {found}; at most {most} in all are taken. Scale it down."
        return Refused(413, "photo_too_large", upload.field, message)


class ClassSets:
    """Class sets of the HTTP API by an id that nobody guesses. Used from the event loop alone."""

    def __init__(self, most: int, idle_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._most, self._idle_seconds, self._clock = most, idle_seconds, clock
        self._kept: dict[str, tuple[ClassSet, float]] = {}

    def check_room(self) -> None:
        """Raises Refused (429) where there is no room, after forgetting those that nobody used for long."""
        now = self._clock()
        self._kept = {i: (s, used) for i, (s, used) in self._kept.items() if now - used < self._idle_seconds}
        if len(self._kept) >= self._most:
            message = f"there are {self._most} class sets, the most that are kept. Delete one, or try again later."
            raise Refused(429, "too_many_class_sets", None, message)

    def add(self, class_set: ClassSet) -> str:
        """Its id. Raises Refused as `check_room`."""
        self.check_room()
        number = secrets.token_urlsafe(16)
        self._kept[number] = (class_set, self._clock())
        return number

    def get(self, number: str) -> ClassSet:
        """Raises Refused (404)."""
        if number not in self._kept or self._clock() - self._kept[number][1] >= self._idle_seconds:
            message = f"there is no class set {number!r:.60}; it was deleted, unused for long, or never made."
            raise Refused(404, "no_such_class_set", "class_set_id", message)
        class_set, _ = self._kept[number]
        self._kept[number] = (class_set, self._clock())
        return class_set

    def delete(self, number: str) -> None:
        """Raises Refused (404)."""
        self.get(number)
        del self._kept[number]

    def __len__(self) -> int:
        return len(self._kept)


def clean_name(name: str | None) -> str:
    """A file's own name without folders and control characters, to be shown and saved under."""
    last = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(c for c in last if not unicodedata.category(c).startswith("C")).strip(". ")
    return kept[-NAME_LENGTH:] or "photo"


def by_class(shown: Sequence[tuple[str, object]]) -> Mapping[str, list]:
    """(class name, prompt) pairs as the prompts of one photo."""
    prompts: dict[str, list] = {}
    for name, prompt in shown:
        prompts.setdefault(name, []).append(prompt)
    return prompts


def _changed(mask: np.ndarray, other: np.ndarray) -> float:
    either = (mask > 0) | (other > 0)
    return float((mask != other).sum() / max(1, either.sum()))
