"""A batch of episodes as tensors, packed: only the (support, class) pairs that are annotated take up space."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from la.episodes import Episode


@dataclass
class EpisodeBatch:
    """B episodes, L supports in all, P packed pairs, C = most ways + 1 class slots, slot 0 the background.

    The background has no prompts but takes part like a class: it has one pair on every support.
    """

    query: Tensor  # (B, h, w, Dv) backbone features
    support: Tensor  # (L, h, w, Dv)
    slots: Tensor  # (B, C) bool: background and the classes that this episode has
    pair_support: Tensor  # (P,) long
    pair_slot: Tensor  # (P,) long, episode * C + slot
    pair_place: Tensor  # (P,) long, place among the pairs of its support
    pair_example: Tensor  # (P,) long, place among the pairs of its slot
    mask_pair: Tensor  # (Q,) long, the pairs that have a mask prompt
    masks: Tensor  # (Q, s, s) float, share of each cell that the prompt covers
    points: Tensor  # (P, n, 2) float, (x, y) in [0, 1]
    point_labels: Tensor  # (P, n) long: 1 inside, 0 outside, -1 padding
    boxes: Tensor  # (P, m, 4) float, (x0, y0, x1, y1) in [0, 1]
    box_valid: Tensor  # (P, m) bool

    def to(self, device: torch.device | str) -> "EpisodeBatch":
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return EpisodeBatch(**moved)

    def pin_memory(self) -> "EpisodeBatch":
        return EpisodeBatch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    @property
    def places(self) -> int:
        """Most pairs on one support."""
        return int(self.pair_place.max()) + 1

    @property
    def examples(self) -> int:
        """Most pairs of one class slot."""
        return int(self.pair_example.max()) + 1


def pack(
    episodes: Sequence[Episode],
    features: Callable[[Sequence[int]], Tensor],
    mask: Callable[[int, tuple[int, ...]], Tensor],
    size: Callable[[int], tuple[int, int]],
) -> EpisodeBatch:
    """Pack episodes.

    `features(image ids)` gives (n, h, w, Dv); `mask(image id, annotation ids)` a (s, s) coverage in 0..1;
    `size(image id)` the photo's (height, width) in pixels.
    """
    slots = max(len(e.classes) for e in episodes) + 1
    images: list[int] = []
    packed: list[tuple[int, int, tuple]] = []  # (support, episode * C + slot, pair or None for background)
    for b, episode in enumerate(episodes):
        first = len(images)
        images += episode.supports
        packed += [(first + k, b * slots, None) for k in range(len(episode.supports))]
        packed += [(first + p.support, b * slots + 1 + p.slot, p) for p in episode.pairs]
    points = [p.points if p else () for _, _, p in packed]
    boxes = [p.boxes if p else () for _, _, p in packed]
    point_table = torch.zeros(len(packed), max(map(len, points)), 2)
    labels = torch.full(point_table.shape[:2], -1, dtype=torch.long)
    box_table = torch.zeros(len(packed), max(map(len, boxes)), 4)
    mask_pair, masks = [], []
    places: dict[int, int] = {}
    examples: dict[int, int] = {}
    place, example = [], []
    for i, (support, slot, pair) in enumerate(packed):
        place.append(places.setdefault(support, 0))
        places[support] += 1
        example.append(examples.setdefault(slot, 0))
        examples[slot] += 1
        if pair is None:
            continue
        height, width = size(images[support])
        if pair.points:
            table = torch.tensor(pair.points, dtype=torch.float32)
            point_table[i, : len(table)] = table[:, :2] / torch.tensor([width, height])
            labels[i, : len(table)] = table[:, 2].long()
        if pair.boxes:
            table = torch.tensor(pair.boxes, dtype=torch.float32)
            box_table[i, : len(table)] = table / torch.tensor([width, height, width, height])
        if pair.masks:
            mask_pair.append(i)
            masks.append(mask(images[support], pair.masks))
    valid = torch.zeros(len(episodes), slots, dtype=torch.bool)
    for b, episode in enumerate(episodes):
        valid[b, : len(episode.classes) + 1] = True
    return EpisodeBatch(
        query=features([e.query for e in episodes]),
        support=features(images),
        slots=valid,
        pair_support=torch.tensor([p[0] for p in packed]),
        pair_slot=torch.tensor([p[1] for p in packed]),
        pair_place=torch.tensor(place),
        pair_example=torch.tensor(example),
        mask_pair=torch.tensor(mask_pair, dtype=torch.long),
        masks=torch.stack(masks) if masks else torch.zeros(0, 4, 4),
        points=point_table,
        point_labels=labels,
        boxes=box_table,
        box_valid=torch.arange(box_table.shape[1]) < torch.tensor([len(b) for b in boxes])[:, None],
    )
