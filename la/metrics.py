"""mIoU as few-shot segmentation counts it: accumulated per class over all episodes (paper section 5.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from la.coco import IGNORED


class FewShotIoU:
    """Intersections and unions per category over episodes.

    torchmetrics' JaccardIndex averages over a fixed list of labels; here slot 1 is another category in every episode,
    and the mean goes over the categories that were drawn, so the counts are kept by category id.
    """

    def __init__(self):
        self.intersection: dict[int, int] = {}
        self.union: dict[int, int] = {}
        self.episodes: dict[int, int] = {}

    def add(self, prediction: Tensor, truth: Tensor, classes: Sequence[int]) -> None:
        """One episode: prediction and truth (H, W) of slots 0..N, truth may hold IGNORED; `classes` are the N ids.

        All N classes are counted in one table, so a confusion of two of them is a miss of one and a false alarm of
        the other.
        """
        size = len(classes) + 1
        counted = truth != IGNORED
        pairs = truth[counted].long() * size + prediction[counted].long()
        table = torch.bincount(pairs.flatten(), minlength=size * size).view(size, size)
        hits, shown, said = table.diagonal().tolist(), table.sum(1).tolist(), table.sum(0).tolist()
        for slot, category in enumerate(classes, start=1):
            self.intersection[category] = self.intersection.get(category, 0) + hits[slot]
            self.union[category] = self.union.get(category, 0) + shown[slot] + said[slot] - hits[slot]
            self.episodes[category] = self.episodes.get(category, 0) + 1

    def __iadd__(self, other: "FewShotIoU") -> "FewShotIoU":
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            for category, count in theirs.items():
                mine[category] = mine.get(category, 0) + count
        return self

    def per_class(self) -> dict[int, float]:
        """Category id -> IoU in percent, for the categories drawn."""
        return {c: 100 * self.intersection[c] / max(1, self.union[c]) for c in sorted(self.union)}

    def miou(self) -> float:
        """Mean IoU in percent over the categories drawn; 0 without an episode."""
        values = self.per_class().values()
        return sum(values) / max(1, len(values))
