"""Training-free methods on the same features and episodes as LA. Each maps an EpisodeBatch to logits (B, C, h, w).

Slot 0 is the background; slots that an episode does not have get -1e4. All see no more of the prompts than which cells
they cover, and all look at directions of features only: unit vectors, whose products are cosines. Defaults come from
seen classes of 214 COCO training photos, 1-way 1-shot with masks, DINOv2 ViT-S/14 at 420 px.

To add one, write a function below `_in_float32` and enter it in BASELINES at the end; evaluations and the variants of a
study name it as their `method`.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.nn import functional as F

from la.episodes.batch import EpisodeBatch
from la.episodes.coverage import slot_weights

EPSILON = 1e-6  # probabilities are kept so far from 0 and 1, where log odds are infinite


def _in_float32(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Outside autocast: bfloat16 cannot tell cosines near 1 apart, and sums into float32 tables refuse it."""

    @wraps(method)
    def run(batch: EpisodeBatch, **settings) -> Tensor:
        with torch.autocast(batch.query.device.type, enabled=False):
            return method(batch, **settings)

    return run


def _units(batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
    """Unit features of the supports (L, h, w, D) and of the queries (B, h, w, D)."""
    return F.normalize(batch.support.float(), dim=-1), F.normalize(batch.query.float(), dim=-1)


@_in_float32
def prototype(batch: EpisodeBatch) -> Tensor:
    """Masked average pooling and cosine, background against each class (as in PANet) -> logits (B, C, h, w).

    A class's prototype is the coverage-weighted mean of the unit features of all its supports, the background's that
    of whatever no prompt of a support covers.
    """
    support, query = _units(batch)
    b, c = batch.slots.shape
    sums = torch.einsum("phwd,phw->pd", support[batch.pair_support], slot_weights(batch))
    table = torch.zeros(b * c, sums.shape[-1], device=sums.device).index_add_(0, batch.pairs.slot, sums)
    prototypes = F.normalize(table, dim=-1).view(b, c, -1)
    logits = torch.einsum("bhwd,bcd->bchw", query, prototypes)
    return logits.masked_fill(~batch.slots[:, :, None, None], -1e4)


@_in_float32
def parts(batch: EpisodeBatch, class_parts: int = 5, background_parts: int = 1, sharpness: float = 3.0) -> Tensor:
    """Several prototypes of a slot, cosine to all of them (as in PPNet) -> logits (B, C, h, w).

    A class has `class_parts`, the background `background_parts` for each support; both are the centres of k-means over
    the tokens of the slot. The logit is a soft maximum of the cosines, log(mean(exp(sharpness * cosine))) / sharpness:
    0 is their mean, infinity their maximum.
    """
    support, query = _units(batch)
    weight = slot_weights(batch)
    b, c = batch.slots.shape
    logits = query.new_full((b * c, *query.shape[1:3]), -1.0)  # the least cosine: a slot without tokens wins nowhere
    for slot in batch.pairs.slot.unique().tolist():
        mine = batch.pairs.slot == slot
        shown = support[batch.pair_support[mine]]
        count = class_parts if slot % c else background_parts * len(shown)
        centres = k_means(shown.flatten(0, 2), weight[mine].flatten(), count)
        if len(centres):
            cosines = query[slot // c] @ centres.T
            logits[slot] = ((sharpness * cosines).logsumexp(-1) - math.log(len(centres))) / sharpness
    return logits.view(b, c, *query.shape[1:3]).masked_fill(~batch.slots[:, :, None, None], -1e4)


def k_means(tokens: Tensor, weight: Tensor, count: int, steps: int = 10) -> Tensor:
    """Spherical k-means: unit tokens (n, D) that count by weight (n,) -> unit centres (at most `count`, D).

    Without chance: the first centre is the token nearest to the mean, each next one the token farthest from all
    centres before it, by its weight. Tokens of weight 0 are left out; fewer tokens than `count`, or fewer different
    ones, give fewer centres.
    """
    tokens, weight = tokens[weight > 0], weight[weight > 0]
    if not len(tokens):
        return tokens
    chosen = [(tokens @ (weight @ tokens)).argmax()]
    nearest = tokens @ tokens[chosen[0]]
    for _ in range(min(count, len(tokens)) - 1):
        chosen.append((weight * (1 - nearest)).argmax())
        nearest = torch.maximum(nearest, tokens @ tokens[chosen[-1]])
    centres = tokens[torch.stack(chosen)]
    for _ in range(steps):
        sums = torch.zeros_like(centres).index_add_(0, (tokens @ centres.T).argmax(1), weight[:, None] * tokens)
        centres = F.normalize(sums[sums.any(1)], dim=1)  # one that no token is nearest to, as of equal tokens, goes
    return centres


@_in_float32
def affinity(batch: EpisodeBatch, temperature: float = 0.5) -> Tensor:
    """Every query pixel attends to every support pixel and reads its coverage (as in DCAMA) -> (B, C, h, w) in 0..1.

    Each class against the supports that show it, one class after the other: y_i = sum_j softmax_j(cos(q_i, s_j) /
    temperature) m_j. As small objects get little of the attention whatever the query shows, the odds of y are divided
    by those of the mean coverage. The background's probability is what the likeliest class leaves. Memory grows with
    query pixels x support pixels of a class.
    """
    support, query = _units(batch)
    weight = slot_weights(batch)
    b, c = batch.slots.shape
    odds = query.new_full((b * c, *query.shape[1:3]), -math.inf)  # log odds; a class that nothing covers is nowhere
    for slot in batch.pairs.slot.unique().tolist():
        mine = batch.pairs.slot == slot
        covered = weight[mine].flatten()
        if slot % c and covered.any():
            attention = (query[slot // c] @ support[batch.pair_support[mine]].flatten(0, 2).T / temperature).softmax(-1)
            odds[slot] = (attention @ covered).logit(EPSILON) - covered.mean().logit(EPSILON)
    probability = odds.sigmoid().view(b, c, *query.shape[1:3])
    probability[:, 0] = 1 - probability.amax(1)
    return probability.masked_fill(~batch.slots[:, :, None, None], -1e4)


@_in_float32
def ridge(batch: EpisodeBatch, penalty: float = 0.1, background_bias: float = -0.2) -> Tensor:
    """A linear probe of each episode in closed form: ridge regression to one-hot slots -> logits (B, C, h, w).

    Unit features and a constant 1 of all support tokens, X (n, D + 1), are regressed on their slots, Y (n, C), with
    weights R by which every slot counts the same and that sum to 1: W = (X'RX + penalty I)^-1 X'RY. The logits of the
    query are its tokens times W, the background's plus `background_bias`.
    """
    support, query = (F.pad(units, (0, 1), value=1.0) for units in _units(batch))
    b, c = batch.slots.shape
    weight, place = slot_weights(batch), batch.pairs.slot % c
    target = weight.new_zeros(len(support), c, *weight.shape[1:]).index_put((batch.pair_support, place), weight)
    target = target.movedim(1, -1)
    background = place == 0  # there is one on every support, so it tells a support's episode
    solutions = []
    for episode in range(b):
        mine = batch.pair_support[background & (batch.pairs.episode == episode)]
        x, y = support[mine].flatten(0, 2), target[mine].flatten(0, 2)
        total = y.sum(0)
        counts = y @ torch.where(total > 0, 1 / total, 0)
        weighted = (x * (counts / counts.sum())[:, None]).T
        gram = weighted @ x + penalty * torch.eye(x.shape[1], device=x.device)
        solutions.append(torch.linalg.solve(gram, weighted @ y))
    logits = torch.einsum("bhwd,bdc->bchw", query, torch.stack(solutions))
    logits[:, 0] += background_bias
    return logits.masked_fill(~batch.slots[:, :, None, None], -1e4)


BASELINES = {"prototype": prototype, "parts": parts, "affinity": affinity, "ridge": ridge}
