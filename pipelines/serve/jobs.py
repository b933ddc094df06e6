"""What takes the model or decodes a photo: jobs, which a queue runs one after the other on one model.

A job is a method of `Jobs`; what it takes and returns is plain data that travels between processes, so that it matters
to nobody which model does it. Nothing of one user is kept in the model: each has a `ClassSet` of his own.
"""

import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from la.data.photos import PHOTO_FORMATS, open_photo
from la.errors import InputError
from la.predictor.encoded_supports import Learned
from la.predictor.predictor import PhotoPrompts, Predictor
from la.predictor.support_set import Support, SupportSet
from pipelines.config import ServeConfig

PREVIEW = 1280  # pixels of the longer side of what is shown; marks and masks are of the photo's own size
MOST_LEFT_OUT = 6  # supports up to which the result is computed again without each of them


class Refused(InputError):
    """What is not done for a user: HTTP status, a code for programs, the field at fault or None, and the message."""

    def __init__(self, status: int, code: str, field: str | None, message: str):
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def __reduce__(self):
        return Refused, (self.status, self.code, self.field, str(self))  # an exception's own way passes one argument


@dataclass(frozen=True)
class Upload:
    """A photo as it was handed in: its name, made harmless, and its bytes. `field` names it in messages."""

    name: str
    data: bytes
    field: str


class Preview(NamedTuple):
    """Of a photo of (height, width) a JPEG that is `reduction` times smaller."""

    size: tuple[int, int]
    jpeg: bytes
    reduction: float


@dataclass(frozen=True, eq=False)
class ClassSet:
    """Classes somebody showed: label i + 1 of masks is `supports.classes[i]`.

    `learned` is of the model that learned it and stays in its process: a pickle does without, `key` is the same.
    """

    supports: SupportSet
    learned: Learned | None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"learned": None}


class Segmentation(NamedTuple):
    """Of one photo: mask (H, W) of labels, scores (N,), and features (1, h, w, Dv) to look at it again."""

    mask: np.ndarray
    scores: np.ndarray
    features: torch.Tensor


class Jobs:
    """One model, and the limits on what it is asked."""

    def __init__(self, config: ServeConfig, predictor: Predictor | None = None):
        """Raises InputError for a checkpoint that cannot be used."""
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.predictor = predictor or Predictor.from_checkpoint(
            config.checkpoint, config.device, config.weights, config.backbone, config.image_size
        )

    def decode(self, upload: Upload) -> Image.Image:
        """RGB, upright. Raises Refused: 413 for too many pixels, known before decoding; 422 for what is no photo."""
        most = self.config.max_photo_pixels
        try:
            opened = Image.open(io.BytesIO(upload.data), formats=PHOTO_FORMATS)
            pixels = f"{opened.width}x{opened.height} pixels"
            if opened.width * opened.height <= most:
                photo = open_photo(opened)
                photo.filename = upload.name  # what messages about prompts call it
                return photo
        except Image.DecompressionBombError:
            pixels = "far more pixels"
        except Exception as error:  # the decoders answer damaged files with errors of many kinds
            message = f"{upload.name} is not a photo, or is damaged; expected a whole JPEG, PNG, WebP or BMP."
            raise Refused(422, "not_a_photo", upload.field, message) from error
        message = f"{upload.name} has {pixels}; at most {most} in all are taken. Scale it down."
        raise Refused(413, "photo_too_large", upload.field, message)

    def preview(self, upload: Upload) -> Preview:
        """To show on a page, at most PREVIEW pixels a side. Raises Refused as `decode`."""
        photo = self.decode(upload)
        size = (photo.height, photo.width)
        photo.thumbnail((PREVIEW, PREVIEW))
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=90)
        return Preview(size, file.getvalue(), size[1] / photo.width)

    def read_support(self, upload: Upload, prompts: PhotoPrompts) -> Support:
        """One annotated photo. Raises InputError for prompts that cannot be used, and as `decode`."""
        return self.predictor.read_supports([self.decode(upload)], [prompts]).supports[0]

    def show(self, shown: Sequence[Support | tuple[Upload, PhotoPrompts]], classes: Sequence[str] = ()) -> ClassSet:
        """Photos with their prompts, or what was read of them before, to a class set.

        Raises InputError as `read_support`, `Predictor.learn` and SupportSet.
        """
        supports = tuple(one if isinstance(one, Support) else self.read_support(*one) for one in shown)
        return self.learned(SupportSet(supports, self.predictor.made_by, tuple(classes)))

    def learned(self, supports: SupportSet, **key: str) -> ClassSet:
        """A class set, by default a new one; with `key` one that was learned elsewhere. InputError as there."""
        return ClassSet(supports, self.predictor.learn(supports), **key)

    def segment(self, class_set: ClassSet, upload: Upload) -> Segmentation:
        """Raises Refused as `decode`."""
        photo = self.decode(upload)
        features = self.predictor.encode([photo])
        found = self.predictor.segment_features(features, [(photo.height, photo.width)], class_set.learned)
        return Segmentation(found.masks[0], found.scores[0], features.cpu())

    def moved(self, class_set: ClassSet, result: Segmentation) -> list[float] | None:
        """How much each support moves a result: of the pixels that have a class with it or without it, the share whose
        class is another without it. None for more than MOST_LEFT_OUT supports."""
        count = len(class_set.supports.supports)
        if count > MOST_LEFT_OUT:
            return None
        return [self._moved_by(class_set.supports, at, result) for at in range(count)]

    def _moved_by(self, supports: SupportSet, left_out: int, result: Segmentation) -> float:
        kept = tuple(support for at, support in enumerate(supports.supports) if at != left_out)
        other = np.zeros_like(result.mask)  # in the labels of all classes
        if kept:
            names = tuple(name for name in supports.classes if any(name in support.shown for support in kept))
            learned = self.predictor.learn(replace(supports, supports=kept, classes=names))
            labels = np.array([0, *(supports.classes.index(name) + 1 for name in names)], result.mask.dtype)
            other = labels[self.predictor.segment_features(result.features, [result.mask.shape], learned).masks[0]]
        either = (result.mask > 0) | (other > 0)
        return float((result.mask != other).sum() / max(1, either.sum()))
