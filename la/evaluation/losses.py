"""Focal loss with class weights (paper section 5.2), and a loss for the IoU that methods are judged by."""

import torch
from torch import Tensor
from torch.nn import functional as F

from la.data.coco import IGNORED

LEAST_SHARE = 0.005  # of the query's pixels: below it a class's weight no longer grows


def focal_loss(logits: Tensor, truth: Tensor, gamma: float = 2.0, class_weights: str = "inverse") -> Tensor:
    """Mean over episodes of the focal loss (1 - p_y)^gamma (-log p_y), pixels weighed by their class.

    logits (B, C, H, W), truth (B, H, W) long with IGNORED pixels left out. Weights depend on a class's share of its own
    query's pixels, so that batch mates and ranks change nothing (with one exception):

    - "inverse": 1 / share, as a weighted mean: every class of the query counts alike, however small;
    - "log": 1 / ln(1.1 + share), a plain mean: nearer to counting pixels, so small objects are easily given up;
    - "log_batch": the same with shares over the whole batch, slot by slot, as the released model was trained: batch
      mates and the number of ranks do change it;
    - "none".

    The paper says "per-class weighting proportional to the number of pixels"; weights that grow with it would deepen
    the imbalance they are to fix, so here they fall with it.
    """
    counted = truth != IGNORED
    target = truth.masked_fill(~counted, 0)
    log_p = logits.float().log_softmax(1).gather(1, target[:, None])[:, 0]
    loss = (1 - log_p.exp()) ** gamma * -log_p
    counted = counted.to(loss.dtype)
    weight = counted
    if class_weights != "none":
        flat = target.flatten(1)
        pixels = logits.new_zeros(logits.shape[:2], dtype=loss.dtype).scatter_add_(1, flat, counted.flatten(1))
        if class_weights == "log_batch":
            pixels = pixels.sum(0, keepdim=True).expand_as(pixels)
        share = pixels / pixels.sum(1, keepdim=True).clamp(min=1)
        of_class = 1 / share.clamp(min=LEAST_SHARE) if class_weights == "inverse" else 1 / torch.log(1.1 + share)
        weight = counted * of_class.gather(1, flat).view_as(loss)
    over = weight if class_weights == "inverse" else counted
    return ((loss * weight).sum((1, 2)) / over.sum((1, 2)).clamp(min=1)).mean()


def iou_loss(logits: Tensor, truth: Tensor, slots: Tensor, likelihood: float = 0.1) -> Tensor:
    """1 - the soft IoU of each class of an episode, weighed by the root of its size, and `likelihood` x cross entropy.

    logits (B, C, H, W), truth (B, H, W) long with IGNORED pixels left out, slots (B, C) bool. The background counts
    only through the pixels that classes wrongly take, and a class that the query does not show through what is
    predicted of it. mIoU sums intersections and unions over queries, so large objects decide; were all weighed alike, a
    threshold that suits small ones would be learned, by area alone small ones would be given up. Each episode's loss
    is its own: batch mates and ranks change nothing.
    """
    pixels = truth[0].numel()
    logits = logits.float()
    entropy = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="none").mean()
    predicted = (logits.softmax(1) * (truth != IGNORED)[:, None])[:, 1:]
    true = truth[:, None] == torch.arange(1, logits.shape[1], device=truth.device)[:, None, None]
    both, size = (predicted * true).sum((2, 3)), true.sum((2, 3))
    either = predicted.sum((2, 3)) + size - both
    few = pixels / 720  # pixels that keep a class of none or of very few from counting in full
    missed = (either - both) / (either + few)
    weight = 3 * (size.clamp(min=few) / pixels).sqrt()  # about 1 for an object of a tenth of the photo
    shown = slots[:, 1:]
    return likelihood * entropy + ((weight * missed * shown).sum(1) / shown.sum(1)).mean()
