"""The labelled objects of a store, which the hybrid's matching is fitted to in closed form before training."""

import torch
from torch.nn import functional as F

from la.episodes import Pool, evaluation_episode
from la.matching import Matching
from pipelines.batches import BatchBuilder
from pipelines.episodes import EpisodeShards, pool_of_shards
from pipelines.store import FeatureStore

MOST_PHOTOS = 5000  # of whose objects the metric is made; more change it little
PROMPTED = 256  # objects that the thresholds of points and boxes are chosen on


@torch.inference_mode()
def fit_matching(matching: Matching, store: FeatureStore, shards: EpisodeShards) -> None:
    """Fit the object metric and the completion of prompts to the training photos and classes of `shards`."""
    pool = pool_of_shards(shards, store)
    builder = BatchBuilder(store, shards.manifest["plan"]["split"])
    if matching.metric is not None:
        matching.metric.fit(*objects_of(pool, builder))
    for kind in ("point", "box"):
        batches = []
        for prompt in (kind, "mask"):
            drawn = [evaluation_episode(pool, "fit", i, 1, 1, prompt) for i in range(PROMPTED)]
            batches.append(builder.pack(drawn).to(matching.completion.point.device))
        matching.completion.fit(*batches)


def objects_of(pool: Pool, builder: BatchBuilder) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, D) mean unit features of each class on each photo, and (n,) its class."""
    photos = sorted(pool.classes_in)
    photos = photos[:: -(-len(photos) // MOST_PHOTOS)]
    objects, classes = [], []
    for photo in photos:
        units = F.normalize(builder.store.read_batch([photo])[0].float(), dim=-1).flatten(0, 1)
        for category in pool.classes_in[photo]:
            cover = builder.coverage(photo, tuple(a.id for a in pool.annotations[photo, category])).flatten()
            objects.append(F.normalize(cover @ units, dim=0))
            classes.append(category)
    return torch.stack(objects), torch.tensor(classes)
