"""Episodes of a store as tensors: features from its shards, masks from its annotations."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from la.batch import EpisodeBatch, pack
from la.coco import IGNORED, Annotation, decode, label_map
from la.episodes import Episode
from pipelines.store import FeatureStore

CACHED_MASKS = 20_000  # small masks kept in memory by each process: about 300 MB at 120 x 120


class BatchBuilder:
    """Packs episodes of one split of a store; masks come at `mask_size` px, four cells to a feature cell."""

    def __init__(self, store: FeatureStore, split: str):
        self.store = store
        self.dataset = store.dataset(split)
        self.mask_size = tuple(4 * n for n in store.info.grid)
        self._annotations = {a.id: a for found in self.dataset.annotations.values() for a in found}
        self._coverage = lru_cache(CACHED_MASKS)(self._draw_coverage)

    def pack(self, episodes: Sequence[Episode]) -> EpisodeBatch:
        return pack(episodes, self.store.read_batch, self._mask, self._size)

    def truth(self, episodes: Sequence[Episode]) -> Tensor:
        """(B, 4h, 4w) long: slots 0..N of each query at the decoder's own resolution, IGNORED where a crowd stands."""
        return torch.stack([self._small_truth(e.query, e.classes) for e in episodes])

    def full_truth(self, episode: Episode) -> Tensor:
        """(H, W) uint8: slots 0..N of the query at the photo's own size."""
        return torch.from_numpy(label_map(self.dataset, episode.query, episode.classes))

    def _size(self, image_id: int) -> tuple[int, int]:
        image = self.dataset.images[image_id]
        return image.height, image.width

    def _mask(self, image_id: int, annotation_ids: tuple[int, ...]) -> Tensor:
        union = np.zeros(self.mask_size, np.float32)
        for one in annotation_ids:
            union += self._coverage(one)
        return torch.from_numpy(union.clip(max=255) / 255)

    def _draw_coverage(self, annotation_id: int) -> np.ndarray:
        """(4h, 4w) uint8: share of each cell that the instance covers, 255 = all."""
        one: Annotation = self._annotations[annotation_id]
        mask = decode([one], *self._size(one.image_id)) * np.uint8(255)
        return np.asarray(Pillow.fromarray(mask).resize(self.mask_size[::-1], Pillow.Resampling.BOX))

    def _small_truth(self, image_id: int, classes: Sequence[int]) -> Tensor:
        """The label map drawn from small masks, in the order in which `label_map` draws it."""
        slot = {category: i + 1 for i, category in enumerate(classes)}
        labels = np.zeros(self.mask_size, np.int64)
        relevant = [a for a in self.dataset.annotations[image_id] if a.category_id in slot]
        for one in sorted(relevant, key=lambda a: (not a.is_crowd, -a.area, a.id)):
            labels[self._coverage(one.id) > 127] = IGNORED if one.is_crowd else slot[one.category_id]
        return torch.from_numpy(labels)
