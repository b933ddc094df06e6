"""Training-free methods on the same features and episodes as LA. Each maps an EpisodeBatch to logits."""

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


def prototype(batch: EpisodeBatch) -> Tensor:
    """Masked average pooling and cosine, background against each class (as in PANet) -> logits (B, C, h, w).

    A class's prototype is the coverage-weighted mean of the unit features of all its supports, the background's that
    of whatever no prompt of a support covers.
    """
    support, query = F.normalize(batch.support.float(), dim=-1), F.normalize(batch.query.float(), dim=-1)
    coverage = prompt_coverage(batch)
    b, c = batch.slots.shape
    covered = torch.zeros(support.shape[:3], device=support.device)
    covered.scatter_reduce_(0, batch.pair_support[:, None, None].expand_as(coverage), coverage, "amax")
    background = batch.pairs.slot % c == 0
    weight = torch.where(background[:, None, None], (1 - covered)[batch.pair_support], coverage)
    sums = torch.einsum("phwd,phw->pd", support[batch.pair_support], weight)
    table = torch.zeros(b * c, sums.shape[-1], device=sums.device).index_add_(0, batch.pairs.slot, sums)
    prototypes = F.normalize(table, dim=-1).view(b, c, -1)
    logits = torch.einsum("bhwd,bcd->bchw", query, prototypes)
    return logits.masked_fill(~batch.slots[:, :, None, None], -1e4)


BASELINES = {"prototype": prototype}
