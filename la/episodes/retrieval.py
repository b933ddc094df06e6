"""Support retrieval: of a pool of annotated photos, those most like a query (future work of the paper)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LARGE = 100_000  # photos from which on faiss searches, where it is installed


def descriptor(features: Tensor) -> Tensor:
    """Features (B, h, w, D) of whole photos -> unit descriptors (B, D): the mean direction of their tokens."""
    return F.normalize(F.normalize(features.float(), dim=-1).mean((1, 2)), dim=-1)


class SupportIndex:
    """Finds the photos of a pool that are nearest to a query by the cosine of their descriptors.

    `ids` (n) name the photos and `descriptors` (n, D) unit vectors describe them. Small pools are compared by one
    matrix product, large ones by faiss; both are exact and agree but for ties, which fall to the smaller id here.
    """

    def __init__(self, ids: Sequence[int], descriptors: Tensor, large: int = LARGE):
        order = np.argsort(ids, kind="stable")
        self._ids = np.asarray(ids)[order]
        self._descriptors = descriptors[torch.from_numpy(order)].contiguous()
        self._place = {int(photo): place for place, photo in enumerate(self._ids)}
        self._faiss = _faiss_index(self._descriptors) if len(self._ids) >= large else None

    def nearest(self, query: Tensor, count: int, among: Sequence[int] | None = None) -> list[int]:
        """At most `count` ids, the most similar first, of those in `among` or of all; query (D,) a descriptor.

        Raises KeyError for an id in `among` that the pool has not.
        """
        places = np.arange(len(self._ids)) if among is None else np.sort([self._place[photo] for photo in among])
        count = min(count, len(places))
        if not count:
            return []
        if self._faiss is not None:
            import faiss

            chosen = faiss.SearchParameters(sel=faiss.IDSelectorBatch(places))
            found = self._faiss.search(query[None].float().cpu().numpy(), count, params=chosen)[1][0]
        else:
            likeness = self._descriptors[torch.from_numpy(places)] @ query.to(self._descriptors)
            found = places[likeness.argsort(descending=True, stable=True)[:count].cpu().numpy()]
        return [int(self._ids[place]) for place in found]


def _faiss_index(descriptors: Tensor):
    try:
        import faiss
    except ImportError:  # slower, but as right
        return None
    index = faiss.IndexFlatIP(descriptors.shape[1])
    index.add(descriptors.float().cpu().numpy())
    return index
