"""The labelled objects of a store, which the hybrid's matching is fitted to in closed form before training."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from la.episodes.pool import Pool
from la.episodes.sampling import evaluation_episode
from la.model.matching import Matching
from pipelines.episodes.batches import BatchBuilder

MOST_PHOTOS = 5000  # of whose objects the metric is made; more change it little
PROMPTED = 256  # objects that the thresholds of points and boxes are chosen on


@torch.inference_mode()
def fit_matching(matching: Matching, sources: Sequence[tuple[Pool, BatchBuilder]]) -> None:
    """Fit the object metric to the photos and classes of all sources, the completion of prompts to the first's."""
    if matching.metric is not None:
        objects, names = zip(*(objects_of(*source) for source in sources), strict=True)
        number = {name: n for n, name in enumerate(sorted({name for some in names for name in some}))}
        classes = torch.tensor([number[name] for some in names for name in some])
        matching.metric.fit(torch.cat(objects), classes)
    pool, builder = sources[0]
    for kind in ("point", "box"):
        batches = []
        for prompt in (kind, "mask"):
            drawn = [evaluation_episode(pool, "fit", i, 1, 1, prompt) for i in range(PROMPTED)]
            batches.append(builder.pack(drawn).to(matching.completion.point.device))
        matching.completion.fit(*batches)


def objects_of(pool: Pool, builder: BatchBuilder) -> tuple[torch.Tensor, list[str]]:
    """(n, D) mean unit features of each class on each photo, and the n names of the classes."""
    photos = sorted(pool.classes_in)
    photos = photos[:: -(-len(photos) // MOST_PHOTOS)]
    objects, classes = [], []
    for photo in photos:
        units = F.normalize(builder.store.read_batch([photo])[0].float(), dim=-1).flatten(0, 1)
        for category in pool.classes_in[photo]:
            cover = builder.coverage(photo, tuple(a.id for a in pool.annotations_of(photo, category))).flatten()
            objects.append(F.normalize(cover @ units, dim=0))
            classes.append(pool.dataset.categories[category])
    return torch.stack(objects), classes
