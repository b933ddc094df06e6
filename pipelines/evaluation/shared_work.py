"""From episodes to logits: any method on packed batches, and LA with what episodes share computed once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from la.episodes.batch import Pairs
from la.episodes.sampling import Episode, Pair
from la.model.label_anything import LabelAnything
from pipelines.episodes.batches import BatchBuilder
from pipelines.evaluation.methods import Method

Predict = Callable[[Sequence[Episode]], Tensor]
CACHE_BYTES = 400e6  # of query maps after the neck
MOST_SUPPORTS = 50_000  # whose embeddings are kept, some kilobytes each

SupportKey = tuple[int, tuple[Pair, ...], bool, bool]


def predictor(method: Method, builder: BatchBuilder, device: torch.device) -> Predict:
    """`method` as a function of episodes of one split, all of the same number of ways."""
    if isinstance(method, LabelAnything) and not method.config.absent_pairs:
        return SharedWork(method, builder, device)
    return lambda episodes: method(builder.pack(episodes).to(device))


class SharedWork:
    """LA with fixed token-pool rows: each annotated support is embedded once, each query goes through the neck once.

    An embedding depends on the photo, its prompts of all classes, the slots of these classes, and on whether the
    episode has masks or sparse prompts at all; on nothing else of the episode. Episodes of a few hundred photos, or of
    many ways and shots, draw the same again and again. The results are those of the model but for rounding.
    """

    def __init__(self, model: LabelAnything, builder: BatchBuilder, device: torch.device):
        self.model, self.builder, self.device = model, builder, device
        self._embedded: dict[SupportKey, Tensor] = {}
        self._queries: OrderedDict[int, Tensor] = OrderedDict()
        h, w = builder.store.info.grid
        self._most_queries = max(1, int(CACHE_BYTES / (4 * h * w * model.config.dim)))
        self._place = model.prompt_encoder.position.grid(h, w)

    def __call__(self, episodes: Sequence[Episode]) -> Tensor:
        """Logits (B, C, 4h, 4w)."""
        slots = max(len(e.classes) for e in episodes) + 1
        valid = torch.zeros(len(episodes), slots, dtype=torch.bool)
        for b, episode in enumerate(episodes):
            valid[b, : len(episode.classes) + 1] = True
        keys = [_keys(episode) for episode in episodes]
        self._embed([key for group in keys for key in group], slots)
        slot = [
            b * slots + s for b, group in enumerate(keys) for key in group for s in (0, *(1 + p.slot for p in key[1]))
        ]
        embeddings = torch.cat([self._embedded[key] for group in keys for key in group])
        pairs = Pairs.of(valid, torch.tensor(slot)).to(self.device)
        prototypes = self.model.mixer(pairs, embeddings)
        grid = self.builder.store.info.grid
        queries = self._through_neck([e.query for e in episodes])
        return self.model.decoder(queries, prototypes, self._place, pairs.slots, grid)

    def _embed(self, keys: Sequence[SupportKey], slots: int) -> None:
        missing = [key for key in dict.fromkeys(keys) if key not in self._embedded]
        if not missing:
            return
        # each as an episode of its own, with as many classes as the real ones have
        alone = [Episode(0, tuple(range(1, slots)), key[0], (key[0],), key[1]) for key in missing]
        batch = self.builder.pack(alone)
        flags = {"any_mask": [key[2] for key in missing], "any_sparse": [key[3] for key in missing]}
        batch = replace(batch, **{name: torch.tensor(values) for name, values in flags.items()}).to(self.device)
        pool = self.model.prompt_encoder.pool
        rows = pool.fixed(len(alone), slots).to(self.device) if pool is not None else None
        embeddings = self.model.embed(batch, rows)
        counts = [1 + len(key[1]) for key in missing]  # background first, then the pairs as in the episode
        self._embedded |= dict(zip(missing, embeddings.split(counts), strict=True))
        if (excess := len(self._embedded) - MOST_SUPPORTS) > 0:
            needed = set(keys)
            for key in [key for key in self._embedded if key not in needed][:excess]:
                del self._embedded[key]

    def _through_neck(self, images: Sequence[int]) -> Tensor:
        missing = [i for i in dict.fromkeys(images) if i not in self._queries]
        if missing:
            maps = self.model.neck(self.builder.store.read_encoded(missing).to(self.device))
            self._queries |= dict(zip(missing, maps, strict=True))
        found = torch.stack([self._queries[i] for i in images])
        while len(self._queries) > self._most_queries:
            self._queries.popitem(last=False)
        return found


def _keys(episode: Episode) -> list[SupportKey]:
    any_mask = any(p.masks for p in episode.pairs)
    any_sparse = any(p.points or p.boxes for p in episode.pairs)
    by_support: list[list[Pair]] = [[] for _ in episode.supports]
    for pair in episode.pairs:
        by_support[pair.support].append(pair._replace(support=0))
    return [
        (image, tuple(pairs), any_mask, any_sparse) for image, pairs in zip(episode.supports, by_support, strict=True)
    ]
