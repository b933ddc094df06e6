"""Annotated supports without their photos: features and prompts, which are kept, saved, merged and chosen from.

What is kept is what the photos were to the model, not the vectors that it pools from them: class prototypes depend on
one another (the class-example mixer, the rows of the token pool), so only from this are the classes of several files
together exactly what they would be had they been shown at once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from la.episodes.batch import EpisodeBatch, pack
from la.episodes.retrieval import SupportIndex, descriptor
from la.episodes.sampling import Episode, Pair
from la.errors import InputError

FORMAT = "label-anything supports 1"


class PromptsOnSupport(NamedTuple):
    """The prompts of one class on one photo: coverage (s, s) uint8 or None, and points and boxes in pixels."""

    mask: Tensor | None
    points: tuple[tuple[float, float, int], ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True)
class Support:
    """One annotated photo: where it came from, its (height, width), features (h, w, Dv) float16, prompts by class."""

    name: str
    size: tuple[int, int]
    features: Tensor
    shown: Mapping[str, PromptsOnSupport]


@dataclass(frozen=True)
class SupportSet:
    """Annotated photos. `made_by` says whose features these are (see `la.predictor.predictor`).

    `classes` orders the class names: class i is label i + 1 of masks. By default, as they are first shown.
    """

    supports: tuple[Support, ...]
    made_by: Mapping
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.supports:
            raise InputError("there are no supports; expected at least one photo with prompts.")
        shown = dict.fromkeys(name for support in self.supports for name in support.shown)
        object.__setattr__(self, "classes", self.classes or tuple(shown))
        if faults := sorted(shown.keys() ^ set(self.classes)):
            raise InputError(f"classes {', '.join(faults)} are either without a support or not named as classes.")

    @property
    def shots(self) -> dict[str, int]:
        """Class name -> number of photos that show it."""
        return {name: len(self.showing(name)) for name in self.classes}

    def showing(self, name: str) -> list[int]:
        """Positions of the photos that show a class."""
        return [at for at, support in enumerate(self.supports) if name in support.shown]

    def only(self, positions: Iterable[int]) -> "SupportSet":
        """These photos alone, in the order of the set; together they have to show all its classes."""
        return replace(self, supports=tuple(self.supports[at] for at in sorted(set(positions))))

    def batch(self, some: range | None = None) -> EpisodeBatch:
        """The supports, or those at the positions `some`, packed as an episode whose query is the first support."""
        slots = {name: slot for slot, name in enumerate(self.classes)}
        pairs = [  # a mask is found by its slot, where an episode of a data set names annotations
            Pair(at, slots[name], (slots[name],) if one.mask is not None else (), one.points, one.boxes)
            for at, support in enumerate(self.supports)
            for name, one in sorted(support.shown.items(), key=lambda item: slots[item[0]])
        ]
        return pack(
            [Episode(0, tuple(range(len(slots))), 0, tuple(range(len(self.supports))), tuple(pairs))],
            lambda ids: torch.stack([self.supports[at].features for at in ids]),
            lambda at, found: self.supports[at].shown[self.classes[found[0]]].mask.float() / 255,
            lambda at: self.supports[at].size,
            some,
        )

    def index(self) -> SupportIndex:
        """Finds the photos most like a query, by their positions."""
        features = torch.stack([support.features for support in self.supports])
        return SupportIndex(range(len(self.supports)), descriptor(features))


def merged(sets: Sequence[SupportSet]) -> SupportSet:
    """The photos and classes of several sets; classes of the same name become one, with the shots of all.

    Raises InputError for sets whose features are of different backbones, sizes or mask sizes.
    """
    first = sets[0]
    for other in sets[1:]:
        if faults := differences(first.made_by, other.made_by):
            raise InputError(f"sets of supports do not fit together: {faults}. Make them with the same checkpoint.")
    classes = dict.fromkeys(name for one in sets for name in one.classes)
    return SupportSet(tuple(support for one in sets for support in one.supports), first.made_by, tuple(classes))


def differences(wanted: Mapping, found: Mapping) -> str:
    """In which of what decides features two `made_by` differ, in words; empty where they do not."""
    return "; ".join(
        f"{name} {found.get(name)} instead of {wanted.get(name)}"
        for name in ("backbone", "weights_digest", "image_size", "layer", "mask_px")
        if found.get(name) != wanted.get(name)
    )


def save_supports(path: Path, supports: SupportSet) -> None:
    """One safetensors file: features and masks, and the rest as JSON in its header."""
    masks = [one.mask for support in supports.supports for one in support.shown.values() if one.mask is not None]
    number = iter(range(len(masks)))
    about = [
        {
            "name": support.name,
            "size": support.size,
            "shown": {
                name: {"mask": None if one.mask is None else next(number), "points": one.points, "boxes": one.boxes}
                for name, one in support.shown.items()
            },
        }
        for support in supports.supports
    ]
    tensors = {"features": torch.stack([support.features.cpu() for support in supports.supports])}
    if masks:
        tensors["masks"] = torch.stack(masks)
    header = {"supports": about, "made_by": dict(supports.made_by), "classes": supports.classes}
    safetensors.torch.save_file(tensors, path, {"format": FORMAT, **{k: json.dumps(v) for k, v in header.items()}})


def load_supports(path: Path) -> SupportSet:
    """The set that `save_supports` wrote. Raises InputError for another file or a damaged one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}")
            features = file.get_tensor("features")
            masks = file.get_tensor("masks") if "masks" in file.keys() else ()  # noqa: SIM118  no mapping
        supports = [
            Support(
                about["name"], tuple(about["size"]), row, {n: _shown(one, masks) for n, one in about["shown"].items()}
            )
            for about, row in zip(json.loads(header["supports"]), features, strict=True)
        ]
        return SupportSet(tuple(supports), json.loads(header["made_by"]), tuple(json.loads(header["classes"])))
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{path} is not a file of saved prototypes ({type(error).__name__}: {error!s:.120}); expected what "
            "`save_prototypes` wrote. Save it again."
        ) from error


def _shown(one: dict, masks: Sequence[Tensor]) -> PromptsOnSupport:
    mask = None if one["mask"] is None else masks[one["mask"]]
    return PromptsOnSupport(
        mask, tuple((x, y, int(label)) for x, y, label in one["points"]), tuple(map(tuple, one["boxes"]))
    )
