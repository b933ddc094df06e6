"""Segment photos by examples: from a checkpoint, a few annotated photos and a query to masks (the paper's figure 1).

predictor = Predictor.from_checkpoint("demo")
predictor.set_support([photo], [{"cat": Points(inside=[(120, 80)]), "dog": Box(10, 20, 200, 180)}])
masks, scores = predictor.segment(["query.jpg"])
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from la.backbone.vit import LAYER, Backbone
from la.data.photos import Photo, name_of, open_photo, squash
from la.device import pick_device
from la.errors import InputError
from la.model.decoder import segment
from la.predictor.checkpoint import Checkpoint, backbone_of, read_checkpoint
from la.predictor.encoded_supports import Learned, learn
from la.predictor.support_set import (
    PromptsOnSupport,
    Support,
    SupportSet,
    differences,
    load_supports,
    merged,
    save_supports,
)
from la.predictor.user_prompts import Prompt, check_prompts, coverage

PHOTOS_AT_ONCE = 8  # through the backbone, as when a feature store is made
MOST_CLASSES = 65535  # labels of a mask

PhotoPrompts = Mapping[str, Prompt | Iterable[Prompt]]  # class name -> its prompts on one photo


class Segmented(NamedTuple):
    """Of each photo its mask (H, W), uint8 or from 256 classes on uint16: 0 background, i + 1 for class i.

    And its scores (N,) float32: the mean probability of the class over the pixels given to it, 0 where there are none.
    """

    masks: list[np.ndarray]
    scores: list[np.ndarray]


class Predictor:
    """One model and its backbone, loaded once. `set_support` and `segment` are for one user; a server keeps a
    `Learned` for each of its users, from `learn`, and hands it to `segment`.
    """

    def __init__(self, checkpoint: Checkpoint, backbone: Backbone, device: torch.device):
        self.checkpoint, self.backbone, self.device = checkpoint, backbone, device
        self.model = checkpoint.model.to(device)
        side = self.model.config.mask_px
        self._mask_size = (side, side) if side else tuple(4 * n for n in backbone.grid)
        self.supports: SupportSet | None = None
        self._learned: Learned | None = None

    @classmethod
    def from_checkpoint(
        cls,
        source: Path | str | Checkpoint,
        device: str = "auto",
        weights: Path | None = None,
        backbone: str | None = None,
        image_size: int | None = None,
    ) -> Self:
        """From a run's folder, a checkpoint file, "demo", which comes with the product, or a checkpoint that was read.

        `weights` is the backbone's file, where it is not had from the hub; `backbone` and `image_size` are for
        checkpoints that do not say them. Raises InputError as `read_checkpoint` and `backbone_of` do.
        """
        place = pick_device(device)
        checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
        return cls(checkpoint, backbone_of(checkpoint, weights, place, backbone, image_size), place)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes shown: label i + 1 of masks is `classes[i]`."""
        return self.supports.classes if self.supports else ()

    @property
    def made_by(self) -> dict[str, Any]:
        """What decides the features of supports, and by which checkpoint they were first used."""
        return {
            "backbone": self.backbone.name,
            "weights_digest": self.backbone.weights_digest,
            "image_size": self.backbone.image_size,
            "layer": LAYER,
            "mask_px": self._mask_size[0],
            "checkpoint": self.checkpoint.name,
            "checkpoint_digest": self.checkpoint.digest,
        }

    def set_support(
        self, images: Sequence[Photo], prompts: Sequence[PhotoPrompts], classes: Sequence[str] = ()
    ) -> SupportSet:
        """Show the classes: photos, and for each a dictionary from class names to prompts in its pixels.

        Prompts are masks (H, W), `Points`, a `Box`, COCO annotations, or a list of these. What was shown before is
        forgotten. `classes` orders the names, by default as they are first shown. Raises InputError for photos and
        prompts that cannot be used, and for different numbers of them.
        """
        return self.use(self.read_supports(images, prompts, classes))

    def use(self, supports: SupportSet) -> SupportSet:
        """Take a set of supports that was made, loaded or merged elsewhere. InputError as `learn`."""
        self._learned = self.learn(supports)
        self.supports = supports
        return supports

    def save_prototypes(self, path: Path | str) -> None:
        """Write what was shown, so that it is used later without its photos; InputError where nothing was."""
        if self.supports is None:
            raise InputError("there is nothing to save: show classes with `set_support` first.")
        save_supports(Path(path), self.supports)

    def load_prototypes(self, *paths: Path | str) -> SupportSet:
        """Take what was saved, the classes of several files together. InputError for files of another backbone."""
        return self.use(merged([self._checked(load_supports(Path(path)), f"{path}") for path in paths]))

    def segment(self, images: Sequence[Photo], learned: Learned | None = None) -> Segmented:
        """Masks at the photos' own sizes and scores; of the classes shown by `set_support`, or of `learned`.

        Raises InputError for a photo that cannot be used, and where no classes were shown.
        """
        result = Segmented([], [])
        for sizes, features in self._encoded(images):
            for found, kept in zip(self.segment_features(features, sizes, learned), result, strict=True):
                kept += found
        return result

    def read_supports(
        self, images: Sequence[Photo], prompts: Sequence[PhotoPrompts], classes: Sequence[str] = ()
    ) -> SupportSet:
        """Annotated photos as features and checked prompts; leaves what was shown before. InputError as there."""
        if len(images) != len(prompts):
            raise InputError(
                f"there are {len(images)} support photos and prompts for {len(prompts)}; expected one dictionary from "
                "class names to prompts for each photo."
            )
        names = [name_of(image) for image in images]
        supports: list[Support] = []
        for sizes, features in self._encoded(images):
            for size, row in zip(sizes, features.cpu(), strict=True):
                at = len(supports)
                supports.append(Support(names[at], size, row, self._shown(prompts[at], size, names[at])))
        return SupportSet(tuple(supports), self.made_by, tuple(classes))

    def learn(self, supports: SupportSet) -> Learned:
        """What the model keeps of supports. Raises InputError where they are another backbone's, and for too many."""
        self._checked(supports, "the supports")
        if len(supports.classes) > MOST_CLASSES:
            raise InputError(f"there are {len(supports.classes)} classes; a mask has labels for {MOST_CLASSES}.")
        return learn(self.model, supports, self.device)

    def encode(self, images: Sequence[Photo]) -> Tensor:
        """Photos -> (n, h, w, Dv) float16 features on the model's device, those of a feature store."""
        return torch.cat([features for _, features in self._encoded(images)])

    def segment_features(
        self, features: Tensor, sizes: Sequence[tuple[int, int]], learned: Learned | None = None
    ) -> Segmented:
        """As `segment`, of features (n, h, w, Dv) of photos of these (height, width)."""
        learned = learned or self._learned
        if learned is None:
            raise InputError("no classes were shown: call `set_support` or `load_prototypes` first.")
        dtype = np.uint8 if len(learned.classes) < 256 else np.uint16
        result = Segmented([], [])
        for logits, size in zip(learned.logits(features.to(self.device)), sizes, strict=True):
            mask, scores = masks_and_scores(logits, size)
            result.masks.append(mask.cpu().numpy().astype(dtype))
            result.scores.append(scores.cpu().numpy())
        return result

    def _encoded(self, images: Sequence[Photo]) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        """PHOTOS_AT_ONCE after PHOTOS_AT_ONCE, the (height, width) and the features (n, h, w, Dv) of photos."""
        for start in range(0, len(images), PHOTOS_AT_ONCE):
            photos = [open_photo(image) for image in images[start : start + PHOTOS_AT_ONCE]]
            pixels = torch.stack([squash(photo, self.backbone.image_size) for photo in photos])
            yield [(photo.height, photo.width) for photo in photos], self.backbone.encode(pixels)

    def _shown(self, prompts: PhotoPrompts, size: tuple[int, int], name: str) -> dict[str, PromptsOnSupport]:
        if not isinstance(prompts, Mapping) or not prompts:
            raise InputError(f"{name}: expected a dictionary from class names to prompts with at least one class.")
        by_class = {}
        for class_name, given in prompts.items():
            masks, points, boxes = check_prompts(given, *size, f"{name}, class {class_name}")
            mask = torch.from_numpy(coverage(masks, self._mask_size)) if masks else None
            by_class[class_name] = PromptsOnSupport(mask, points, boxes)
        return by_class

    def _checked(self, supports: SupportSet, what: str) -> SupportSet:
        if faults := differences(self.made_by, supports.made_by):
            raise InputError(f"{what}: features of {faults}. Use the checkpoint they are of, or show the photos anew.")
        return supports


@torch.inference_mode()
def masks_and_scores(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Logits (C, h, w) -> slots (H, W) at `size`, and of each class (C - 1,) its score, taken at the logits' own size.

    A class whose few pixels appear only at the photo's size scores its largest probability.
    """
    mask = segment(logits, size)
    probability = logits.softmax(0)
    won = torch.zeros_like(probability, dtype=torch.bool).scatter_(0, logits.argmax(0, keepdim=True), True)
    mean = (probability * won).sum((1, 2)) / won.sum((1, 2)).clamp(min=1)
    scores = torch.where(won.any(1).any(1), mean, probability.amax((1, 2)))
    there = mask.flatten().bincount(minlength=len(logits)) > 0
    return mask, (scores * there)[1:]
