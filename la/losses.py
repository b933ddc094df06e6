"""Focal loss with class weights (paper section 5.2)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from la.coco import IGNORED


def focal_loss(logits: Tensor, truth: Tensor, gamma: float = 2.0, weighted: bool = True) -> Tensor:
    """Mean over the episodes of the mean over pixels of w_y (1 - p_y)^gamma (-log p_y).

    logits (B, C, H, W), truth (B, H, W) long with IGNORED pixels left out. `weighted`: w_c = 1 / ln(1.1 + share of c
    among the query's pixels), per episode, so that batch mates and ranks change nothing. The paper says only "per-class
    weighting proportional to the number of pixels"; weights that grow with it would deepen the imbalance they are to
    mend, so they fall with it.
    """
    counted = truth != IGNORED
    target = truth.masked_fill(~counted, 0)
    log_p = logits.float().log_softmax(1).gather(1, target[:, None])[:, 0]
    loss = (1 - log_p.exp()) ** gamma * -log_p
    counted = counted.to(loss.dtype)
    if weighted:
        pixels = torch.zeros(logits.shape[:2], device=logits.device).scatter_add_(
            1, target.flatten(1), counted.flatten(1)
        )
        share = pixels / pixels.sum(1, keepdim=True).clamp(min=1)
        loss = loss * (1 / torch.log(1.1 + share)).gather(1, target.flatten(1)).view_as(loss)
    per_episode = (loss * counted).sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)
    return per_episode.mean()


def truth_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W) labels sampled at the cell centres of a (h, w) grid."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()
