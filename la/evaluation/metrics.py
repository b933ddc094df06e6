"""The metrics of few-shot segmentation, accumulated over episodes (paper section 5.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from la.data.coco import IGNORED


class EpisodeScore(NamedTuple):
    """Pixels of one episode: (intersection, union) of each class, of all classes as one foreground, of the rest."""

    classes: tuple[int, ...]  # category ids
    counts: tuple[tuple[int, int], ...]  # of each class
    foreground: tuple[int, int]
    background: tuple[int, int]

    def miou(self) -> float:
        """Mean IoU in percent over this episode's classes; a class that is neither there nor predicted counts 100."""
        return float(np.mean([100 * hits / union if union else 100.0 for hits, union in self.counts]))


def score_episode(prediction: Tensor, truth: Tensor, classes: Sequence[int]) -> EpisodeScore:
    """Prediction and truth (H, W) of slots 0..N, truth may hold IGNORED; `classes` are the N category ids.

    A confusion of two classes is a miss of one and a false alarm of the other.
    """
    # comparisons of bytes, counted by numpy: torch's sum of booleans takes six times as long
    said, shown = prediction.to(torch.uint8).numpy(), truth.numpy()
    known = shown != IGNORED

    def counts(shown_here: np.ndarray, said_here: np.ndarray) -> tuple[int, int]:
        hits = np.count_nonzero(shown_here & said_here)
        return hits, np.count_nonzero(shown_here) + np.count_nonzero(said_here) - hits

    slots = [counts(shown == slot, (said == slot) & known) for slot in range(len(classes) + 1)]
    foreground = counts((shown > 0) & known, (said > 0) & known)
    return EpisodeScore(tuple(classes), tuple(slots[1:]), foreground, slots[0])


class FewShotIoU:
    """Scores of episodes, kept apart for resampling.

    torchmetrics' JaccardIndex averages over a fixed list of labels; here slot 1 is another category in every episode,
    and the mean goes over the categories that were drawn, so counts are kept by category id. With several ways this is
    the mIoU* of the literature: only classes count, the background does not.
    """

    def __init__(self, episodes: Sequence[EpisodeScore] = ()):
        self.episodes = list(episodes)

    def add(self, prediction: Tensor, truth: Tensor, classes: Sequence[int]) -> None:
        """One episode, see `score_episode`."""
        self.episodes.append(score_episode(prediction, truth, classes))

    def __iadd__(self, other: "FewShotIoU") -> "FewShotIoU":
        self.episodes += other.episodes
        return self

    def per_class(self) -> dict[int, float]:
        """Category id -> accumulated IoU in percent, for the categories drawn."""
        categories, hits, unions, _ = self._table()
        return dict(zip(categories, _percent(hits.sum(0), unions.sum(0)).tolist(), strict=True))

    def episodes_per_class(self) -> dict[int, int]:
        """Category id -> number of episodes that ask for it."""
        categories, _, _, asked = self._table()
        return dict(zip(categories, asked.sum(0).tolist(), strict=True))

    def miou(self) -> float:
        """Mean over the categories drawn of their accumulated IoU, in percent; 0 without an episode."""
        values = self.per_class().values()
        return sum(values) / max(1, len(values))

    def fb_iou(self) -> float:
        """Mean of the accumulated IoU of the foreground (all classes as one) and of the background, in percent."""
        sums = np.array([(e.foreground, e.background) for e in self.episodes]).reshape(-1, 2, 2).sum(0)
        return float(_percent(sums[:, 0], sums[:, 1]).mean())

    def resampled(self, resamples: int = 1000, seed: int = 0) -> np.ndarray:
        """(resamples,) mIoU in percent of as many episodes drawn with replacement: always the same draws."""
        _, hits, unions, asked = self._table()
        count = len(self.episodes)
        times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
        drawn = times @ asked > 0
        return np.where(drawn, _percent(times @ hits, times @ unions), 0).sum(1) / drawn.sum(1)

    def _table(self) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
        """Category ids, then (episodes, categories) each: intersections, unions, whether the episode asks for it."""
        categories = sorted({c for e in self.episodes for c in e.classes})
        column = {c: k for k, c in enumerate(categories)}
        hits, unions, asked = np.zeros((3, len(self.episodes), len(categories)), np.int64)
        for row, episode in enumerate(self.episodes):
            columns = [column[c] for c in episode.classes]
            hits[row, columns], unions[row, columns] = np.array(episode.counts).T
            asked[row, columns] = 1
        return categories, hits, unions, asked


def resampled_means(seeds: Sequence[FewShotIoU]) -> np.ndarray:
    """(resamples,) mean over seeds of their mIoU in percent; episodes are resampled within each seed.

    The draws are always the same, so two methods on the same episodes may be subtracted, element by element.
    """
    return np.mean([scores.resampled(seed=seed) for seed, scores in enumerate(seeds)], axis=0)


def interval_of(resampled: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle `share` of the resampled means."""
    low, high = np.quantile(resampled, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _percent(hits: np.ndarray, unions: np.ndarray) -> np.ndarray:
    return 100 * hits / np.maximum(1, unions)
