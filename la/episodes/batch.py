"""A batch of episodes as tensors, packed: only the (support, class) pairs that are annotated take up space."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from la.backbone.quantised import Quantised
from la.episodes.sampling import Episode


class _Movable:
    """Of dataclasses of tensors: moves every tensor in them, also those of dataclasses they hold."""

    def map(self, move: Callable[[Tensor | Quantised], Tensor | Quantised]) -> Self:
        def moved(value):
            if isinstance(value, Tensor | Quantised):
                return move(value)
            return value.map(move) if isinstance(value, _Movable) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        """Features in eight bits are decoded there."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self.map(lambda tensor: tensor.pin_memory())


@dataclass
class Pairs(_Movable):
    """Where P packed pairs belong: B episodes with C = most ways + 1 class slots each, slot 0 the background.

    Sizes are kept as numbers, so that no step waits for a GPU to learn them.
    """

    slots: Tensor  # (B, C) bool: background and the classes that this episode has
    slot: Tensor  # (P,) long, episode * C + slot
    episode: Tensor  # (P,) long
    shown: Tensor  # (S,) long, the pairs of classes: all but the background's
    example: Tensor  # (P,) long, place among the pairs of its slot
    order: Tensor  # (P,) long, place among the pairs of its episode
    counted: Tensor  # (P,) bool, whether the pair counts in its class's mean: all but those `dense_grid` adds
    most_examples: int
    most_orders: int

    @classmethod
    def of(cls, slots: Tensor, slot: Tensor, counted: Tensor | None = None) -> Self:
        """From slots (B, C) and each pair's slot (P,)."""
        episode = slot // slots.shape[1]
        shown = (slot % slots.shape[1]).nonzero()[:, 0]
        example, order = ranks(slot), ranks(episode)
        counted = torch.ones_like(slot, dtype=torch.bool) if counted is None else counted
        return cls(slots, slot, episode, shown, example, order, counted, _most(example), _most(order))

    @classmethod
    def merged(cls, parts: "Sequence[Pairs]") -> Self:
        """The pairs of several chunks of the same episodes' supports, one after the other."""
        slot, counted = (torch.cat([getattr(p, name).cpu() for p in parts]) for name in ("slot", "counted"))
        return cls.of(parts[0].slots.cpu(), slot, counted).to(parts[0].slots.device)


@dataclass
class EpisodeBatch(_Movable):
    """B episodes, L supports in all, P packed pairs.

    The background has no prompts but takes part like a class: it has one pair on every support. Features of an int8
    store are Quantised until the batch is moved to the device it is used on.
    """

    query: Tensor  # (B, h, w, Dv) backbone features
    support: Tensor  # (L, h, w, Dv)
    support_counts: tuple[int, ...]  # of each support, how many its episode has, with those of other chunks
    pairs: Pairs
    pair_support: Tensor  # (P,) long
    pair_place: Tensor  # (P,) long, place among the pairs of its support
    most_places: int
    mask_pair: Tensor  # (Q,) long, the pairs that have a mask prompt
    masks: Tensor  # (Q, s, s) float, share of each cell that the prompt covers
    points: Tensor  # (P, n, 2) float, (x, y) in [0, 1]
    point_labels: Tensor  # (P, n) long: 1 inside, 0 outside, -1 padding
    boxes: Tensor  # (P, m, 4) float, (x0, y0, x1, y1) in [0, 1]
    box_valid: Tensor  # (P, m) bool
    sparse_pair: Tensor  # (S,) long, the pairs that have points or boxes
    other_pair: Tensor  # (P - S,) long, those that have none
    any_mask: Tensor  # (B,) bool, whether an episode has a mask prompt at all
    any_sparse: Tensor  # (B,) bool, whether it has a point or a box

    @property
    def slots(self) -> Tensor:
        """(B, C) bool: the class slots that each episode has."""
        return self.pairs.slots


def pack(
    episodes: Sequence[Episode],
    features: Callable[[Sequence[int]], Tensor | Quantised],
    mask: Callable[[int, tuple[int, ...]], Tensor],
    size: Callable[[int], tuple[int, int]],
    supports: range | None = None,
) -> EpisodeBatch:
    """Pack episodes.

    `features(image ids)` gives (n, h, w, Dv); `mask(image id, annotation ids)` a (s, s) coverage in 0..1;
    `size(image id)` the photo's (height, width) in pixels. `supports` takes only these positions of each episode's
    supports, for `LabelAnything.embed` chunk by chunk.
    """
    slots = max(len(e.classes) for e in episodes) + 1
    images: list[int] = []
    counts: list[int] = []
    packed: list[tuple[int, int, tuple]] = []  # (support, episode * C + slot, pair or None for background)
    for b, episode in enumerate(episodes):
        taken = [k for k in range(len(episode.supports)) if supports is None or k in supports]
        row = {k: len(images) + i for i, k in enumerate(taken)}
        images += [episode.supports[k] for k in taken]
        counts += [len(episode.supports)] * len(taken)
        packed += [(row[k], b * slots, None) for k in taken]
        packed += [(row[p.support], b * slots + 1 + p.slot, p) for p in episode.pairs if p.support in row]
    points = [p.points if p else () for _, _, p in packed]
    boxes = [p.boxes if p else () for _, _, p in packed]
    marks = np.zeros((len(packed), max(map(len, points)), 3), np.float32)  # x and y in pixels, label
    marks[..., 2] = -1
    corners = np.zeros((len(packed), max(map(len, boxes)), 4), np.float32)  # in pixels
    sides = np.ones((len(packed), 1, 2), np.float32)
    mask_pair, masks = [], []
    for i, (support, _, pair) in enumerate(packed):
        if pair is None:
            continue
        sides[i] = size(images[support])[::-1]
        if pair.points:
            marks[i, : len(pair.points)] = pair.points
        if pair.boxes:
            corners[i, : len(pair.boxes)] = pair.boxes
        if pair.masks:
            mask_pair.append(i)
            masks.append(mask(images[support], pair.masks))
    valid = torch.zeros(len(episodes), slots, dtype=torch.bool)
    for b, episode in enumerate(episodes):
        valid[b, : len(episode.classes) + 1] = True
    pair_support = torch.tensor([p[0] for p in packed])
    place = ranks(pair_support)
    sparse = torch.tensor([bool(p or b) for p, b in zip(points, boxes, strict=True)])
    return EpisodeBatch(
        query=features([e.query for e in episodes]),
        support=features(images),
        support_counts=tuple(counts),
        pairs=Pairs.of(valid, torch.tensor([p[1] for p in packed])),
        pair_support=pair_support,
        pair_place=place,
        most_places=_most(place),
        mask_pair=torch.tensor(mask_pair, dtype=torch.long),
        masks=torch.stack(masks) if masks else torch.zeros(0, 4, 4),
        points=torch.from_numpy(marks[..., :2] / sides),
        point_labels=torch.from_numpy(marks[..., 2].astype(np.int64)),
        boxes=torch.from_numpy(corners / np.tile(sides, 2)),
        box_valid=torch.from_numpy(np.arange(corners.shape[1]) < np.array([len(b) for b in boxes])[:, None]),
        sparse_pair=sparse.nonzero()[:, 0],
        other_pair=(~sparse).nonzero()[:, 0],
        any_mask=torch.tensor([any(p.masks for p in e.pairs) for e in episodes]),
        any_sparse=torch.tensor([any(p.points or p.boxes for p in e.pairs) for e in episodes]),
    )


def dense_grid(batch: EpisodeBatch) -> EpisodeBatch:
    """The batch with a pair for every support and every class of its episode; those not annotated have no prompts.

    For comparison, and for checkpoints trained on such grids (see `ModelConfig.absent_pairs`).
    """
    pairs, slots = batch.pairs, batch.slots
    slots_per = slots.shape[1]
    background = pairs.slot % slots_per == 0  # there is one on every support, so it tells a support's episode
    episode_of = batch.pair_support.new_zeros(len(batch.support))
    episode_of[batch.pair_support[background]] = pairs.episode[background]
    missing = slots[episode_of]
    missing[batch.pair_support, pairs.slot % slots_per] = False
    support, slot = missing.nonzero().unbind(1)
    extra = len(support)
    all_slots = torch.cat((pairs.slot, episode_of[support] * slots_per + slot))
    counted = torch.cat((pairs.counted, pairs.counted.new_zeros(extra)))
    pair_support = torch.cat((batch.pair_support, support))
    place = ranks(pair_support)

    def padded(table: Tensor, value: float = 0) -> Tensor:
        return torch.cat((table, table.new_full((extra, *table.shape[1:]), value)))

    return replace(
        batch,
        pairs=Pairs.of(slots, all_slots, counted),
        pair_support=pair_support,
        pair_place=place,
        most_places=_most(place),
        points=padded(batch.points),
        point_labels=padded(batch.point_labels, -1),
        boxes=padded(batch.boxes),
        box_valid=padded(batch.box_valid),
        other_pair=torch.cat((batch.other_pair, len(batch.pair_support) + torch.arange(extra, device=slot.device))),
    )


def ranks(keys: Tensor) -> Tensor:
    """(P,) -> (P,): how many earlier entries have the same key."""
    order = keys.argsort(stable=True)
    place = torch.arange(len(keys), device=keys.device)
    ordered = keys[order]
    first = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
    start = torch.where(first, place, 0).cummax(0).values
    return torch.empty_like(keys).index_put((order,), place - start)


def _most(places: Tensor) -> int:
    return int(places.max()) + 1
