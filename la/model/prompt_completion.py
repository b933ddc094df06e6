"""Points and boxes completed to what they stand for: how much each support token belongs to the object."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from la.episodes.batch import EpisodeBatch
from la.episodes.coverage import box_coverage, mask_coverage, point_coverage

EPSILON = 1e-4  # shares are kept so far from 0 and 1, where log odds are infinite


def logit(share: Tensor) -> Tensor:
    """Log odds of shares, kept finite."""
    return share.clamp(EPSILON, 1 - EPSILON).logit()


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
        inside, outside = F.normalize(torch.stack((boxes, 1 - boxes), 1) @ image, dim=-1).unbind(1)
        leaning = (image @ (inside - outside)[..., None])[..., 0]
        points = point_coverage(batch, grid).flatten(2)[:, pairs].to(support)
        repelled, resembled = _most_alike(image, points, batch.points.shape[1])
        return boxes, leaning, points[1], resembled, repelled

    def _completed(self, boxes: Tensor, leaning: Tensor, on: Tensor, resembled: Tensor, repelled: Tensor) -> Tensor:
        """(S, n) in 0..1: boxes and the cells of points, and the cosines that decide what belongs to them."""
        boxes = boxes * torch.sigmoid((leaning - self.box) / self.softness)
        points = torch.sigmoid((resembled - torch.maximum(self.point, repelled)) / self.softness)
        points = torch.maximum(points * on.amax(1, keepdim=True), on)
        return torch.maximum(points, boxes)


def _most_alike(image: Tensor, cells: Tensor, most: int) -> Tensor:
    """image (P, n, D) unit features, cells (2, P, n) in 0..1, at most `most` of a row above 0 -> (2, P, n).

    The cosine to the most similar token marked, or -1.
    """
    if not most:
        return torch.full_like(cells, -1.0)
    marked, index = cells.topk(min(most, cells.shape[2]))
    keys = image.gather(1, index.transpose(0, 1).flatten(1)[..., None].expand(-1, -1, image.shape[-1]))
    alike = (image @ keys.transpose(1, 2)).unflatten(2, (2, -1)).movedim(2, 0)
    return alike.masked_fill(marked[:, :, None] == 0, -1.0).amax(-1)
