"""What training-free matching knows of a query, for every class of an episode: maps that a decoder can read.

Prototypes and affinities of annotated pairs are summed over shots before anything looks at them, so each shot sharpens
the same maps. Between query and support maps of n tokens an affinity has n x n entries; they are made for a few
supports at a time, once for all classes that a support shows, and never kept. Their cost is linear in the number of
supports up to `MOST_TOKENS`, and never more than that: beyond, a support's neighbouring tokens are compared as one.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from la.episodes.batch import EpisodeBatch
from la.model.object_metric import ObjectMetric
from la.model.prompt_completion import EPSILON, PromptCompletion, logit

PAIRS_AT_ONCE = 8  # whose tokens are summed together
MOST_TOKENS = 10_000  # of an episode's supports for affinity: 11 photos of 30 x 30, each token by itself
AFFINITIES_AT_ONCE = 2**22  # entries in memory together, 16 MB: what is worked on in place should not leave the cache
TEMPERATURES = (0.1, 0.05)  # of affinities; where one is half of that before it, a square takes an exponential's place
GPU_ROOM = 64  # times as many on a GPU, where few large operators are what is fast
SMOOTHING = 0.07  # temperature at which a query token takes after the tokens that resemble it


class Matching(nn.Module):
    """Query against supports, by masked-average prototypes and by affinity, as maps (B, C, K, h, w); slot 0 is zeros.

    `prototypes`: cosines to the class and to the rest of its supports, with `metric` once more in the object metric.
    `affinity`: log odds of the coverage that a query token reads from the support tokens of all classes of the episode,
    over those of the mean coverage, at each of `TEMPERATURES`; in the object metric where there is one. Last, three
    numbers: the logs of the covered share of the supports, of the number of classes, and of the number of shots.
    """

    def __init__(self, channels: int, prototypes: bool = True, affinity: bool = True, metric: bool = True):
        super().__init__()
        self.prototypes, self.affinity = prototypes, affinity
        self.metric = ObjectMetric(channels) if metric else None
        self.completion = PromptCompletion()
        # What each map says for the class before anything is learned: an affinity is a quarter of its log odds.
        cosines = (1.0, -1.0) * (1 + metric) * prototypes
        self.votes = (*cosines, *(4 / len(TEMPERATURES) for _ in TEMPERATURES if affinity), 0.0, 0.0, 0.0)
        self.maps = len(self.votes)

    @torch.no_grad()
    def forward(self, batch: EpisodeBatch | Iterable[EpisodeBatch]) -> Tensor:
        """-> (B, C, K, h, w), in the precision of the module's buffers.

        The supports of the same episodes in chunks (see `la.episodes.batch.pack`) give the same in less memory.
        """
        chunks = iter([batch] if isinstance(batch, EpisodeBatch) else batch)
        first = next(chunks)
        supports = (part for chunk in itertools.chain([first], chunks) for part in self.annotated(chunk))
        return self.match(first.query, first.slots, supports)

    @torch.no_grad()
    def annotated(self, batch: EpisodeBatch) -> list["Annotated"]:
        """What matching needs of the supports of a batch, whatever the query; parts with as many keys a support."""
        with torch.autocast(batch.support.device.type, enabled=False):  # bfloat16 cannot tell cosines near 1 apart
            support = self._units(batch.support)
            shown = batch.pairs.shown  # background pairs have no prompts
            slot, photo = batch.pairs.slot[shown], batch.pair_support[shown]
            weight = self.completion(batch, support)[shown]
            keys = self._in_metric(support) if self.affinity else support  # once, however many classes a photo shows
            grid = batch.support.shape[1:3]
            sides = [_side(count, grid) for count in batch.support_counts]
            if len(set(sides)) == 1:
                return [Annotated.of(slot, photo, weight, support, keys, grid, sides[0])]
            found = []
            for side in sorted(set(sides)):
                rows = torch.tensor([row for row, its in enumerate(sides) if its == side], device=photo.device)
                place = photo.new_zeros(len(sides)).index_put((rows,), torch.arange(len(rows), device=photo.device))
                of = torch.isin(photo, rows)
                pairs = (slot[of], place[photo[of]], weight[of])
                found.append(Annotated.of(*pairs, support[rows], keys[rows], grid, side))
            return found

    @torch.no_grad()
    def match(self, query: Tensor, slots: Tensor, supports: Iterable["Annotated"]) -> Tensor:
        """query (B, h, w, D), slots (B, C) bool and the annotated supports, in chunks -> (B, C, K, h, w)."""
        (b, c), (h, w) = slots.shape, query.shape[1:3]
        with torch.autocast(query.device.type, enabled=False):
            query = self._units(query)
            smooth = self._in_metric(smoothed(query))
            seen = _Sums(b, c, query)
            for some in supports:
                seen.count(some)
                if self.prototypes:
                    seen.add(some)
                if self.affinity:
                    seen.attend(smooth, some)
            maps: list[Tensor] = []
            if self.prototypes:
                prototypes = F.normalize(seen.covered, dim=-1)
                maps += seen.cosines(query, prototypes)
                maps += seen.cosines(smooth, self.metric(prototypes)) if self.metric is not None else []
            covered, shots = seen.cover[0], seen.cover[1].clamp(min=1)
            if self.affinity:
                maps += seen.odds()
        shown = F.pad(slots[:, 1:], (1, 0))
        ways = shown.sum(1, keepdim=True, dtype=shots.dtype).expand(-1, c).flatten()
        numbers = torch.stack(((covered / shots).clamp(min=EPSILON), ways.clamp(min=1), shots)).log()
        numbers = (numbers / numbers.new_tensor([[4], [1], [1]]))[..., None].expand(-1, -1, h * w)
        return torch.stack([*maps, *numbers], 1).view(b, c, self.maps, h, w) * shown[:, :, None, None, None]

    def _units(self, features: Tensor) -> Tensor:
        """(B, h, w, D) -> unit features (B, n, D)."""
        return F.normalize(features.to(self.completion.point.dtype), dim=-1).flatten(1, 2)

    def _in_metric(self, units: Tensor) -> Tensor:
        return units if self.metric is None else self.metric(units)


@dataclass(frozen=True)
class Annotated:
    """L supports with p annotated pairs as matching sees them: nothing here depends on a query.

    Their n tokens are m keys: themselves, or the directions of the means of squares of neighbours.
    """

    slot: Tensor  # (p,) long, episode * C + slot
    photo: Tensor  # (p,) long, the pair's support
    weight: Tensor  # (p, m) in 0..1, how much each key belongs to the class
    mass: Tensor  # (m,) the tokens of each key
    sums: Tensor  # (2, p, D): the unit tokens of the pair's class, and the rest of its support
    keys: Tensor  # (L, m, D) in the space of affinity

    @classmethod
    def of(
        cls, slot: Tensor, photo: Tensor, weight: Tensor, tokens: Tensor, keys: Tensor, grid: Sequence[int], side: int
    ) -> "Annotated":
        """From weights (p, n), unit tokens (L, n, D) and these in the space of affinity, of a grid (h, w)."""
        shares = torch.stack((weight, 1 - weight), 1)
        at_once = PAIRS_AT_ONCE if tokens.device.type == "cpu" else GPU_ROOM * PAIRS_AT_ONCE
        some = zip(shares.split(at_once), photo.split(at_once), strict=True)
        sums = torch.cat([share @ tokens[of] for share, of in some]).transpose(0, 1)
        mass = torch.ones_like(tokens[0, :, 0])
        if side > 1:
            mass = _pooled(mass, grid, side)
            weight = _pooled(weight, grid, side) / mass
            keys = F.normalize(_pooled(keys.transpose(1, 2), grid, side).transpose(1, 2), dim=-1)
        return cls(slot, photo, weight, mass, sums, keys)

    @property
    def cover(self) -> Tensor:
        """(p,): the share of its support that a pair's class covers."""
        return (self.weight * self.mass).sum(1) / self.mass.sum()

    def episode(self, slots: int) -> Tensor:
        """(L,) long, of each support; 0 for one that no pair is on."""
        return self.slot.new_zeros(len(self.keys)).index_put((self.photo,), self.slot // slots)

    def values(self, slots: int) -> Tensor:
        """(L, C, m): how much a support's tokens belong to each class; in place of slot 0, the number of its pairs."""
        values = self.weight.new_zeros(len(self.keys), slots, self.weight.shape[1])
        values.flatten(0, 1).index_add_(0, self.photo * slots + self.slot % slots, self.weight)
        values[:, 0].index_add_(0, self.photo, torch.ones_like(self.weight))
        return values * self.mass


def _side(supports: int, grid: Sequence[int]) -> int:
    """Of the squares of tokens that are one key where an episode has so many supports of h x w tokens."""
    return max(1, math.ceil(math.sqrt(supports * math.prod(grid) / MOST_TOKENS)))


def keys_of(supports: int, grid: Sequence[int]) -> int:
    """How many keys each of so many supports of h x w tokens has."""
    side = _side(supports, grid)
    return math.prod(-(-n // side) for n in grid)


def _pooled(maps: Tensor, grid: Sequence[int], side: int) -> Tensor:
    """(..., h * w) -> (..., m): sums over squares of `side` x `side`, cut where the grid ends."""
    h, w = grid
    square = F.pad(maps.unflatten(-1, (h, w)), (0, -w % side, 0, -h % side))
    return square.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).sum((-1, -3)).flatten(-2)


class _Sums:
    """Over the annotated pairs seen so far, by slot: what all maps are made of."""

    def __init__(self, b: int, slots: int, query: Tensor):
        n, d = query.shape[1:]
        self.slots = slots
        self.cover = query.new_zeros(2, b * slots)  # mean weights of the pairs, and their number
        self.covered = query.new_zeros(2, b * slots, d)  # support tokens of the class, and the rest of its supports
        # of each temperature, the coverage that query tokens read; in place of slot 0, all attention of the episode
        self.read = query.new_zeros(len(TEMPERATURES), b, slots, n)

    def count(self, supports: Annotated) -> None:
        cover = supports.cover
        self.cover.index_add_(1, supports.slot, torch.stack((cover, torch.ones_like(cover))))

    def add(self, supports: Annotated) -> None:
        self.covered.index_add_(1, supports.slot, supports.sums)

    def attend(self, query: Tensor, supports: Annotated) -> None:
        """Unit query tokens (B, n, D) in the space of affinity."""
        sharp = query.transpose(1, 2) / TEMPERATURES[0]
        room = AFFINITIES_AT_ONCE if query.device.type == "cpu" else GPU_ROOM * AFFINITIES_AT_ONCE
        at_once = max(1, room // (query.shape[1] * supports.keys.shape[1]))
        parts = (supports.episode(self.slots), supports.values(self.slots), supports.keys)
        # cosines are 1 at most, so the largest exponent is known and no second pass over the shots is needed
        largest, read = sharp.new_tensor([[[-1 / TEMPERATURES[0]]]]), []
        for episode, values, keys in zip(*(part.split(at_once) for part in parts), strict=True):
            asking = sharp.expand(len(keys), -1, -1) if len(sharp) == 1 else sharp[episode]
            attention = torch.baddbmm(largest, keys, asking).exp_()
            read.append([values @ attention])
            for sharper, temperature in itertools.pairwise(TEMPERATURES):
                read[-1].append(values @ attention.pow_(sharper / temperature))
        self.read.index_add_(1, parts[0], torch.stack([torch.cat(some) for some in zip(*read, strict=True)]))

    def cosines(self, query: Tensor, prototypes: Tensor) -> list[Tensor]:
        """Unit query tokens (B, n, D) and prototypes (2, B * C, D) -> of the class and the rest, (B * C, n) each."""
        return list((prototypes.unflatten(1, (-1, self.slots)) @ query.transpose(1, 2)).flatten(1, 2))

    def odds(self) -> list[Tensor]:
        """Of each temperature (B * C, n): over the support tokens of all classes of an episode, which compete so."""
        covered, pairs = self.cover.unflatten(1, (-1, self.slots))
        mean = covered / pairs.sum(1, keepdim=True).clamp(min=1)
        found = logit(self.read / self.read[:, :, :1].clamp(min=1e-30))
        return list(((found - logit(mean)[..., None]) / 4).flatten(1, 2))


def smoothed(units: Tensor) -> Tensor:
    """Unit tokens (B, n, D), each the mean of those that resemble it: one token says little of the object it is of."""
    alike = (units @ (units / SMOOTHING).transpose(1, 2)).sub_(1 / SMOOTHING).exp_()
    return F.normalize(alike @ units, dim=-1)
