"""What training-free matching knows of a query, for every class of an episode: maps that a decoder can read.

Prototypes and affinities of annotated pairs are summed over shots before anything looks at them, so cost is linear in
the number of shots and each shot sharpens the same maps. Between query and support maps of n tokens an affinity has
n x n entries; they are made for a few pairs at a time and never kept.
"""

import itertools
from collections.abc import Callable, Iterable

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
    mean coverage. `metric`: both once more in the object metric. Last, three numbers: the logs of the covered share of
    the supports, of the number of classes, and of the number of shots.
    """

    def __init__(self, channels: int, prototypes: bool = True, affinity: bool = True, metric: bool = True):
        super().__init__()
        self.prototypes, self.affinity = prototypes, affinity
        self.metric = ObjectMetric(channels) if metric else None
        self.completion = PromptCompletion()
        self.maps = (1 + metric) * (3 * prototypes + affinity) + 3

    @torch.no_grad()
    def forward(self, batch: EpisodeBatch | Iterable[EpisodeBatch]) -> Tensor:
        """-> (B, C, K, h, w), in the precision of the module's buffers.

        The supports of the same episodes in chunks (see `la.batch.pack`) give the same in the memory of one chunk.
        """
        chunks = iter([batch] if isinstance(batch, EpisodeBatch) else batch)
        first = next(chunks)
        device, (b, c), (h, w) = first.query.device, first.slots.shape, first.query.shape[1:3]
        with torch.autocast(device.type, enabled=False):  # bfloat16 cannot tell cosines near 1 apart
            views, cover = self._views(self._units(first.query), c), self.completion.point.new_zeros(2, b * c)
            for chunk in itertools.chain([first], chunks):
                self._add(views, cover, chunk)
            share = cover[0] / cover[1].clamp(min=1)
            maps: list[Tensor] = []
            for view in views:
                maps += view.of_prototypes() if self.prototypes else []
                maps += view.of_affinity(share) if self.affinity else []
        ways = first.slots.sum(1).sub(1).to(share).repeat_interleave(c)
        numbers = (share.clamp(min=EPSILON).log() / 4, ways.clamp(min=1).log(), cover[1].clamp(min=1).log())
        maps += [number[:, None].expand(-1, h * w) for number in numbers]
        shown = first.slots & (torch.arange(c, device=device) > 0)
        return torch.stack(maps, 1).view(b, c, self.maps, h, w) * shown[:, :, None, None, None]

    def _units(self, features: Tensor) -> Tensor:
        """(B, h, w, D) -> unit features (B, n, D)."""
        return F.normalize(features.to(self.completion.point.dtype), dim=-1).flatten(1, 2)

    def _views(self, query: Tensor, slots: int) -> "list[_View]":
        views = [_View(query, query, slots, lambda units: units)]
        if self.metric is not None:
            # a token alone says little of the object it is part of: it takes after the tokens that resemble it
            alike = torch.exp((query @ query.transpose(1, 2) - 1) / SMOOTHING)
            smooth = self.metric(F.normalize(alike @ query, dim=-1))
            views.append(_View(self.metric(query), smooth, slots, self.metric))
        return views

    def _add(self, views: "list[_View]", cover: Tensor, batch: EpisodeBatch) -> None:
        """Add a batch's pairs to the views, and to `cover` (2, B * C) the sum of their mean weights and their count."""
        support = self._units(batch.support)
        shown = (batch.pairs.slot % batch.slots.shape[1] > 0).nonzero()[:, 0]  # the background's pairs have no prompts
        weights = self.completion(batch, support)
        for some in shown.split(PAIRS_AT_ONCE):
            slot, weight, tokens = batch.pairs.slot[some], weights[some], support[batch.pair_support[some]]
            cover.index_add_(1, slot, torch.stack((weight.mean(1), torch.ones_like(weight[:, 0]))))
            for view in views:
                view.add(slot, weight, tokens)


class _View:
    """Query tokens, those that meet prototypes, both (B, n, D), and sums over the annotated pairs seen so far."""

    def __init__(self, query: Tensor, meeting: Tensor, slots: int, metric: Callable[[Tensor], Tensor]):
        self.query, self.meeting, self.slots, self.metric = query, meeting, slots, metric
        b, n, d = query.shape
        self.covered = query.new_zeros(2, b * slots, d)  # support tokens of each slot, and the rest of its supports
        self.read = query.new_zeros(2, b * slots, n)  # coverage that query tokens read, and by how much attention

    def add(self, slot: Tensor, weight: Tensor, tokens: Tensor) -> None:
        """p pairs: slot (p,), weight (p, n) in 0..1, unit tokens (p, n, D)."""
        sums = torch.stack((weight, 1 - weight)).unsqueeze(2) @ tokens
        self.covered.index_add_(1, slot, sums[:, :, 0])
        # cosines are 1 at most, so the largest exponent is known and no second pass over the shots is needed
        scores = self.query[slot // self.slots] @ self.metric(tokens).transpose(1, 2)
        scores = torch.exp((scores - 1) / TEMPERATURE)
        self.read.index_add_(1, slot, torch.stack(((scores @ weight[..., None])[..., 0], scores.sum(-1))))

    def of_prototypes(self) -> list[Tensor]:
        """(B * C, n) each."""
        ready = self.metric(F.normalize(self.covered, dim=-1)).unflatten(1, (-1, self.slots))
        of_class, of_rest = (self.meeting @ ready.transpose(2, 3)).transpose(2, 3).flatten(1, 2)
        return [of_class, of_rest, standardised(of_class - of_rest)]

    def of_affinity(self, share: Tensor) -> list[Tensor]:
        """(B * C, n), given the mean weight of each slot's pairs (B * C,)."""
        seen = (self.read[0] / self.read[1].clamp(min=1e-30)).clamp(EPSILON, 1 - EPSILON)
        return [(seen.logit() - share.clamp(EPSILON, 1 - EPSILON).logit()[:, None]) / 4]


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
