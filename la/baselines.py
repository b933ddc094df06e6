"""Training-free methods on the same features and episodes as LA. Each maps an EpisodeBatch to logits (B, C, h, w).

Slot 0 is the background; slots that an episode does not have get -1e4. All see no more of the prompts than which cells
they cover, and all look at directions of features only: unit vectors, whose products are cosines. Defaults come from
seen classes of 214 COCO training photos, 1-way 1-shot with masks, DINOv2 ViT-S/14 at 420 px.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.nn import functional as F

from la.batch import EpisodeBatch


def prompt_coverage(batch: EpisodeBatch) -> Tensor:
    """(P, h, w) in 0..1: how much of each feature cell the prompts of a pair cover; zeros for background pairs.

    A mask counts by its share of the cell, a box covers the cells whose centres it holds, a point the cell it is in.
    """
    h, w = batch.support.shape[1:3]
    device = batch.support.device
    coverage = torch.zeros(len(batch.pair_support), h, w, device=device)
    y = ((torch.arange(h, device=device) + 0.5) / h)[:, None]
    x = ((torch.arange(w, device=device) + 0.5) / w)[None, :]
    for k in range(batch.boxes.shape[1]):
        x0, y0, x1, y1 = batch.boxes[:, k, :, None, None].unbind(1)
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        coverage = torch.maximum(coverage, (inside & batch.box_valid[:, k, None, None]).float())
    pair, point = (batch.point_labels == 1).nonzero(as_tuple=True)
    column, row = (batch.points[pair, point] * torch.tensor([w, h], device=device)).long().unbind(-1)
    coverage[pair, row.clamp(0, h - 1), column.clamp(0, w - 1)] = 1
    if len(batch.masks):
        pooled = F.interpolate(batch.masks[:, None].float(), (h, w), mode="area")[:, 0]
        coverage[batch.mask_pair] = torch.maximum(coverage[batch.mask_pair], pooled)
    return coverage


def slot_weights(batch: EpisodeBatch) -> Tensor:
    """(P, h, w) in 0..1: how much each feature cell of a pair's support counts for the pair's slot.

    A class's cells count by their coverage, the background's by what no prompt of the support covers.
    """
    coverage = prompt_coverage(batch)
    covered = torch.zeros(batch.support.shape[:3], device=batch.support.device)
    covered.scatter_reduce_(0, batch.pair_support[:, None, None].expand_as(coverage), coverage, "amax")
    background = batch.pairs.slot % batch.slots.shape[1] == 0
    return torch.where(background[:, None, None], (1 - covered)[batch.pair_support], coverage)


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


BASELINES = {"prototype": prototype}
