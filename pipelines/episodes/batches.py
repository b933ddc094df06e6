"""Episodes of a store as tensors: features from its shards, masks from its annotations."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from la.data.coco import drawing_order, label_map
from la.episodes.batch import EpisodeBatch, pack
from la.episodes.sampling import Episode
from pipelines.store.reader import FeatureStore


class BatchBuilder:
    """Packs episodes of one split of a store.

    The truth comes at four cells to a feature cell, mask prompts too or at `mask_px` a side.
    """

    def __init__(self, store: FeatureStore, split: str, mask_px: int | None = None):
        self.store = store
        self.dataset = store.dataset(split)
        self.truth_size = tuple(4 * n for n in store.info.grid)
        self.mask_size = (mask_px, mask_px) if mask_px else self.truth_size
        self._small = {size: store.small_masks(split, size) for size in {self.truth_size, self.mask_size}}

    def pack(self, episodes: Sequence[Episode], supports: range | None = None) -> EpisodeBatch:
        """`supports`: only these positions of each episode's supports, see `la.episodes.batch.pack`."""
        return pack(episodes, self.store.read_encoded, self._mask, self._size, supports)

    def chunks(self, episodes: Sequence[Episode], supports: int) -> Iterator[EpisodeBatch]:
        """The episodes in batches of at most so many supports of each, each read when it is asked for."""
        for start in range(0, max(len(e.supports) for e in episodes), supports):
            yield self.pack(episodes, range(start, start + supports))

    def truth(self, episodes: Sequence[Episode]) -> Tensor:
        """(B, 4h, 4w) long: slots 0..N of each query at the decoder's own resolution, IGNORED where a crowd stands."""
        labels = np.zeros((len(episodes), *self.truth_size), np.int64)
        small = self._small[self.truth_size]
        for one, episode in zip(labels, episodes, strict=True):
            # as `label_map` draws it, from small masks
            for annotation, label in drawing_order(self.dataset.annotations[episode.query], episode.classes):
                part, cells = small[annotation.id]
                np.copyto(one[part], label, where=cells > 127)
        return torch.from_numpy(labels)

    def full_truth(self, episode: Episode, size: tuple[int, int] | None = None) -> Tensor:
        """(H, W) uint8: slots 0..N of the query at the photo's own size, or resized to `size` without blending."""
        labels = torch.from_numpy(label_map(self.dataset, episode.query, episode.classes))
        return labels if size is None else F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0]

    def coverage(self, image_id: int, annotation_ids: tuple[int, ...]) -> Tensor:
        """(h, w) in 0..1: the share of each feature cell that the instances cover."""
        return F.interpolate(self._mask(image_id, annotation_ids)[None, None], self.store.info.grid, mode="area")[0, 0]

    def _size(self, image_id: int) -> tuple[int, int]:
        image = self.dataset.images[image_id]
        return image.height, image.width

    def _mask(self, image_id: int, annotation_ids: tuple[int, ...]) -> Tensor:
        union = np.zeros(self.mask_size, np.float32)
        for part, cells in map(self._small[self.mask_size].__getitem__, annotation_ids):
            union[part] += cells
        np.minimum(union, 255, out=union)
        return torch.from_numpy(np.divide(union, 255, out=union))
