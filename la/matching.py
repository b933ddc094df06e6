"""What training-free matching knows of a query, for every class of an episode: maps that a decoder can read.

Prototypes and affinities of annotated pairs are summed over shots before anything looks at them, so cost is linear in
the number of shots and each shot sharpens the same maps. Between query and support maps of n tokens an affinity has
n x n entries; they are made for a few pairs at a time and never kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from la.baselines import box_coverage, mask_coverage, point_coverage
from la.batch import EpisodeBatch

PAIRS_AT_ONCE = 8  # whose affinities are in memory together
TEMPERATURE = 0.1  # of affinities
SMOOTHING = 0.07  # temperature at which a query token takes after the tokens that resemble it
EPSILON = 1e-4  # shares are kept so far from 0 and 1, where log odds are infinite


class ObjectMetric(nn.Module):
    """A linear map of features in which objects of one class lie together, fitted in closed form to labelled objects.

    An object is the mean of the unit features that its mask covers, o. With m the mean of objects and S their mean
    covariance within a class, x becomes (S / tr(S) D + shrinkage I)^-1/2 (x - m): linear discriminant analysis with a
    metric that carries over to classes it was not fitted to. Before `fit` it is the identity.
    """

    shrinkage = 2.0

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("map", torch.eye(channels))

    def fit(self, objects: Tensor, classes: Tensor) -> None:
        """objects (n, D), classes (n,) long; classes of a single object say nothing of the spread and are left out."""
        objects = objects.to(self.mean)
        number = classes.unique(return_inverse=True)[1].to(objects.device)
        counts = number.bincount()
        centres = torch.zeros(len(counts), objects.shape[1]).to(objects).index_add_(0, number, objects)
        apart = (objects - (centres / counts[:, None])[number])[counts[number] > 1]
        values, vectors = torch.linalg.eigh(apart.T @ apart)
        scale = (values / values.mean().clamp(min=1e-12) + self.shrinkage).rsqrt()
        self.mean.copy_(objects.mean(0))
        self.map.copy_(vectors @ scale.diag() @ vectors.T)

    def forward(self, units: Tensor) -> Tensor:
        """Unit features (..., D) -> unit features (..., D)."""
        return F.normalize((units - self.mean) @ self.map, dim=-1)


class Matching(nn.Module):
    """Query against supports, by masked-average prototypes and by affinity, as maps (B, C, K, h, w); slot 0 is zeros.

    `prototypes`: cosines to the class and to the rest of its supports, and their difference standardised over the
    query. `affinity`: log odds of the coverage that a query token reads from all support tokens, over those of the
    mean coverage. `metric`: both once more in the object metric. Last, two numbers: the logs of the covered share of
    the supports and of the number of classes.
    """

    def __init__(self, channels: int, prototypes: bool = True, affinity: bool = True, metric: bool = True):
        super().__init__()
        self.prototypes, self.affinity = prototypes, affinity
        self.metric = ObjectMetric(channels) if metric else None
        self.completion = PromptCompletion()
        self.maps = (1 + metric) * (3 * prototypes + affinity) + 2

    @torch.no_grad()
    def forward(self, batch: EpisodeBatch) -> Tensor:
        """-> (B, C, K, h, w), in the precision of the module's buffers."""
        # never in bfloat16, which cannot tell cosines near 1 apart
        with torch.autocast(batch.query.device.type, enabled=False):
            return self._forward(batch)

    def _forward(self, batch: EpisodeBatch) -> Tensor:
        b, c = batch.slots.shape
        h, w = batch.query.shape[1:3]
        shown = (batch.pairs.slot % c > 0).nonzero()[:, 0]  # pairs of classes: the background's have no prompts
        slot, place = batch.pairs.slot[shown], batch.pair_support[shown]
        support, query = (
            F.normalize(x.to(self.completion.point.dtype), dim=-1).flatten(1, 2) for x in (batch.support, batch.query)
        )
        weight = self.completion(batch, support)[shown]
        share = _summed(weight.mean(1), slot, b * c) / _summed(torch.ones_like(weight[:, 0]), slot, b * c).clamp(min=1)
        covered = _Covered(slot, weight, support, place, share)
        maps = self._maps(query, query, covered, lambda units: units)
        if self.metric is not None:
            # a token alone says little of the object it is part of: it takes after the tokens that resemble it
            alike = torch.exp((query @ query.transpose(1, 2) - 1) / SMOOTHING)
            smooth = self.metric(F.normalize(alike @ query, dim=-1))
            maps += self._maps(smooth, self.metric(query), covered, self.metric)
        ways = batch.slots.sum(1).sub(1).to(share).repeat_interleave(c)
        numbers = (share.clamp(min=EPSILON).log() / 4, ways.clamp(min=1).log())
        maps += [number[:, None].expand(-1, h * w) for number in numbers]
        table = torch.stack(maps, 1).view(b, c, self.maps, h, w)
        shown = batch.slots & (torch.arange(c, device=slot.device) > 0)
        return table * shown[:, :, None, None, None]

    def _maps(self, against_prototypes: Tensor, query: Tensor, covered: "_Covered", metric: Callable) -> list[Tensor]:
        """(B * C, n) each; the two views of the query are (B, n, D), `metric` takes support tokens where they are."""
        (b, n, d), total = query.shape, len(covered.share)
        slots = total // b
        prototypes, read = query.new_zeros(2, total, d), query.new_zeros(2, total, n)
        for slot, weight, keys in covered.chunks():
            if self.prototypes:
                sums = torch.stack((weight, 1 - weight)).unsqueeze(2) @ keys
                prototypes.index_add_(1, slot, sums[:, :, 0])
            if self.affinity:
                # cosines are 1 at most, so the largest exponent is known and no second pass over the shots is needed
                scores = torch.exp((query[slot // slots] @ metric(keys).transpose(1, 2) - 1) / TEMPERATURE)
                read.index_add_(1, slot, torch.stack(((scores @ weight[..., None])[..., 0], scores.sum(-1))))
        found: list[Tensor] = []
        if self.prototypes:
            ready = metric(F.normalize(prototypes, dim=-1)).unflatten(1, (b, slots))
            of_class, of_rest = (against_prototypes @ ready.transpose(2, 3)).transpose(2, 3).flatten(1, 2)
            found += [of_class, of_rest, standardised(of_class - of_rest)]
        if self.affinity:
            seen = (read[0] / read[1].clamp(min=1e-30)).clamp(EPSILON, 1 - EPSILON)
            found.append((seen.logit() - covered.share.clamp(EPSILON, 1 - EPSILON).logit()[:, None]) / 4)
        return found


@dataclass
class _Covered:
    """The P annotated pairs of classes, and a few of them at a time with their tokens."""

    slot: Tensor  # (P,) long
    weight: Tensor  # (P, n) in 0..1
    support: Tensor  # (L, n, D) unit features
    place: Tensor  # (P,) long
    share: Tensor  # (B * C,) mean weight of the slot's pairs

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(slot, weight, tokens (p, n, D)) of at most PAIRS_AT_ONCE pairs."""
        for some in torch.arange(len(self.slot), device=self.slot.device).split(PAIRS_AT_ONCE):
            yield self.slot[some], self.weight[some], self.support[self.place[some]]


class PromptCompletion(nn.Module):
    """From the prompts of a pair to how much each support token belongs to it: masks as they are, others completed.

    Around points belong the tokens that resemble one of them more than a threshold, and more than any point outside
    the object. Inside boxes belong the tokens that resemble the inside more than the outside, by a threshold. Both are
    cosines that depend on the backbone: `fit` chooses them on objects whose masks are known.
    """

    softness = 0.02  # of a threshold
    choices = torch.linspace(-0.3, 0.98, 65)  # steps of 0.02

    def __init__(self):
        super().__init__()
        # before `fit`, what fits DINOv2 ViT-S/14 on COCO
        self.register_buffer("point", torch.tensor(0.92))
        self.register_buffer("box", torch.tensor(-0.04))

    def fit(self, prompted: EpisodeBatch, masked: EpisodeBatch) -> None:
        """Choose the threshold of the kind of prompt that `prompted` has; `masked` is the same pairs with masks.

        By the mean soft IoU of completed prompts and masks.
        """
        truth = mask_coverage(masked, masked.support.shape[1:3]).flatten(1)[prompted.sparse_pair]
        evidence = self._evidence(prompted, F.normalize(prompted.support.float(), dim=-1).flatten(1, 2))
        threshold = self.box if prompted.box_valid.any() else self.point
        scores = []
        for choice in self.choices:
            threshold.fill_(choice)
            found = self._completed(*evidence)
            both = (found * truth).sum(1)
            scores.append((both / (found.sum(1) + truth.sum(1) - both).clamp(min=EPSILON)).mean())
        threshold.fill_(self.choices[torch.stack(scores).argmax()])

    def forward(self, batch: EpisodeBatch, support: Tensor) -> Tensor:
        """support (L, n, D) unit features -> (P, n) in 0..1; zeros for background pairs."""
        weight = mask_coverage(batch, batch.support.shape[1:3]).flatten(1).to(support)
        pairs = batch.sparse_pair
        if len(pairs):
            found = torch.maximum(self._completed(*self._evidence(batch, support)), weight[pairs])
            weight = weight.index_put((pairs,), found)
        return weight

    @staticmethod
    def _evidence(batch: EpisodeBatch, support: Tensor) -> tuple[Tensor, ...]:
        """Of the S pairs with points or boxes, (S, n) each: what `_completed` takes."""
        grid, pairs = batch.support.shape[1:3], batch.sparse_pair
        image = support[batch.pair_support[pairs]]
        boxes = box_coverage(batch, grid).flatten(1)[pairs].to(support)
        inside, outside = (F.normalize(torch.einsum("pn,pnd->pd", x, image), dim=-1) for x in (boxes, 1 - boxes))
        leaning = torch.einsum("pnd,pd->pn", image, inside - outside)
        on, off = (point_coverage(batch, grid, label).flatten(1)[pairs].to(support) for label in (1, 0))
        return boxes, leaning, on, _most_alike(image, on), _most_alike(image, off)

    def _completed(self, boxes: Tensor, leaning: Tensor, on: Tensor, resembled: Tensor, repelled: Tensor) -> Tensor:
        """(S, n) in 0..1: boxes and the cells of points, and the cosines that decide what belongs to them."""
        boxes = boxes * torch.sigmoid((leaning - self.box) / self.softness)
        points = torch.sigmoid((resembled - torch.maximum(self.point, repelled)) / self.softness)
        points = torch.maximum(points * on.amax(1, keepdim=True), on)
        return torch.maximum(points, boxes)


def _most_alike(image: Tensor, cells: Tensor) -> Tensor:
    """image (P, n, D) unit features, cells (P, n) in 0..1 -> (P, n): cosine to the most similar token marked, or -1."""
    most = int((cells > 0).sum(1).max())
    if not most:
        return torch.full_like(cells, -1.0)
    marked, index = cells.topk(most, dim=1)
    keys = image.gather(1, index[..., None].expand(-1, -1, image.shape[-1]))
    return (image @ keys.transpose(1, 2)).masked_fill(marked[:, None] == 0, -1.0).amax(-1)


def standardised(x: Tensor) -> Tensor:
    """(..., n) with mean 0 and deviation 1 over the last dimension."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-3)


def _summed(values: Tensor, slot: Tensor, total: int) -> Tensor:
    """(P, ...) -> (total, ...), the sum over the pairs of each slot."""
    return values.new_zeros(total, *values.shape[1:]).index_add(0, slot, values)
