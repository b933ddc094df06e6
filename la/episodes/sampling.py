"""Episodes and how they are drawn: pure functions of (protocol, fold, split, seed, index) (paper sections 3 and 4.4).

How the query of a test episode is drawn is in `la.episodes.query_draws`, that of training in `training_episode`.

All chance comes from `random.Random(text).random()`, whose sequence Python guarantees for good, so an episode is the
same on every machine, with every number of workers, in whatever order episodes are drawn.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from la.episodes.chance import pick, sample, shuffle
from la.episodes.pool import Pool
from la.episodes.query_draws import QUERY_DRAWS
from la.errors import InputError, TooFewImages

PROMPT_KINDS = ("mask", "point", "box")
PROMPT_SETS = tuple(  # the seven non-empty sets of prompt types
    tuple(kind for bit, kind in enumerate(PROMPT_KINDS) if chosen >> bit & 1) for chosen in range(1, 8)
)


Retrieve = Callable[[int, Sequence[int], int], list[int]]  # (query, images to choose from, how many) -> images


class Pair(NamedTuple):
    """The prompts of one class on one support image: an annotated (support, class) pair.

    `support` and `slot` are positions in the episode's supports and classes. `masks` are ids of the annotations whose
    union is the mask prompt; `points` are (x, y, label) with label 1 inside the object, 0 outside; `boxes` are
    (x0, y0, x1, y1). Coordinates are pixels of the support photo.
    """

    support: int
    slot: int
    masks: tuple[int, ...]
    points: tuple[tuple[float, float, int], ...]
    boxes: tuple[tuple[float, float, float, float], ...]


class Episode(NamedTuple):
    """A few-shot task: `classes` (category ids) to segment in image `query`, shown on the images `supports`."""

    index: int
    classes: tuple[int, ...]
    query: int
    supports: tuple[int, ...]
    pairs: tuple[Pair, ...]


def evaluation_episode(
    pool: Pool,
    name: str,
    index: int,
    ways: int,
    shots: int,
    prompt: str,
    varied: bool = False,
    query_draw: str = "class",
    retrieve: Retrieve | None = None,
) -> Episode:
    """Episode `index` of a test protocol: N-way K-shot, prompts "mask", "point", "box", "point_box" or "mixed".

    A class and a query that shows it are drawn as `query_draw` says (`la.episodes.query_draws`), then the other
    classes, then K supports of each. `name` says protocol, fold, split and seed. Classes, query and
    supports do not depend on `prompt`, so that prompt kinds are compared on the same episodes. "mixed" prompts are of
    one kind for each annotation, drawn at random. With `varied`, a class gets 1 to K supports, or more where photos
    drawn for other classes show it too. `retrieve` picks the supports of a class for the query in place of chance;
    classes and query stay the same. Raises TooFewImages where classes or images are too few.
    """
    usable = pool.usable(shots)
    if len(usable) < ways:
        raise TooFewImages(
            f"{name}: {ways}-way {shots}-shot episodes need {ways} classes with {shots + 1} images each; "
            f"{len(usable)} of {len(pool.classes)} classes have them. Lower ways or shots, or use more images."
        )
    uniform = random.Random(f"{name}/{index}/{ways}/{shots}").random
    of_seed = random.Random(f"{name}/{ways}/{shots}/classes").random  # the chance that all episodes of a seed share
    first, query, usable = QUERY_DRAWS[query_draw](pool, ways, shots, uniform, of_seed)
    others = [c for c in usable if c != first]
    classes = [first, *sample(others, ways - 1, uniform)]
    shuffle(classes, uniform)
    supports = _draw_supports(pool, classes, query, shots, uniform, varied, retrieve)
    kinds = ("point", "box") if prompt == "point_box" else (prompt,)
    uniform = random.Random(f"{name}/{index}/{ways}/{shots}/prompts").random
    draw_kinds = (lambda: (pick(PROMPT_KINDS, uniform),)) if prompt == "mixed" else (lambda: kinds)
    pairs = _prompt_pairs(pool, classes, supports, draw_kinds, uniform, jitter=0.0)
    return Episode(index, tuple(classes), query, tuple(supports), pairs)


def training_episode(
    pool: Pool, name: str, index: int, ways: int, shots: int, prompts: Sequence[str] = PROMPT_KINDS, jitter: float = 0.1
) -> Episode:
    """Episode `index` of training (section 4.4): the query shows 1 to N of the N classes, each count equally likely.

    The wanted count is lowered to the most that any image of the first class shows. A class with few images gives
    fewer shots. The episode draws one of the sets of `prompts` (seven of all three), every annotation one type of it;
    boxes are jittered by N(0, `jitter` x side), 20 pixels at most.
    Raises InputError where fewer than `ways` classes have two images.
    """
    usable = pool.usable(1)
    if len(usable) < ways:
        raise InputError(f"{name}: {ways}-way training needs {ways} classes with 2 images; {len(usable)} have them.")
    uniform = random.Random(f"{name}/{index}/{ways}/{shots}").random
    first = pick(usable, uniform)
    images, minus_counts = pool.by_richness[first]
    wanted = min(1 + int(uniform() * ways), -minus_counts[0])
    query = images[int(uniform() * bisect_right(minus_counts, -wanted))]
    inside = [c for c in pool.classes_in[query] if len(pool.images_of[c]) > 1]
    classes = [first, *sample([c for c in inside if c != first], wanted - 1, uniform)]
    outside = [c for c in usable if c not in inside]
    classes += sample(outside, ways - wanted, uniform)
    if len(classes) < ways:  # an image that shows nearly every class
        classes += sample([c for c in inside if c not in classes], ways - len(classes), uniform)
    shuffle(classes, uniform)
    supports = _draw_supports(pool, classes, query, shots, uniform)
    kinds = pick([kinds for kinds in PROMPT_SETS if set(kinds) <= set(prompts)], uniform)
    pairs = _prompt_pairs(pool, classes, supports, lambda: (pick(kinds, uniform),), uniform, jitter)
    return Episode(index, tuple(classes), query, tuple(supports), pairs)


def _draw_supports(
    pool: Pool,
    classes: list[int],
    query: int,
    shots: int,
    uniform,
    varied: bool = False,
    retrieve: Retrieve | None = None,
) -> list[int]:
    """`shots` images of each class, never the query, no image twice; the rest as in `evaluation_episode`."""
    supports: list[int] = []
    for category in classes:
        wanted = shots
        if varied:
            wanted = 1 + int(uniform() * shots) - sum(category in pool.classes_in[image] for image in supports)
        images = pool.images_of[category]
        taken = {query, *supports}
        if retrieve is not None:
            drawn = retrieve(query, [i for i in images if i not in taken], wanted)
        elif len(images) > 4 * (len(taken) + wanted):  # rejection: no pass over a class with thousands of images
            drawn = []
            while len(drawn) < wanted:
                image = pick(images, uniform)
                if image not in taken:
                    taken.add(image)
                    drawn.append(image)
        else:
            drawn = sample([i for i in images if i not in taken], wanted, uniform)
        supports += drawn
    return supports


def _prompt_pairs(pool: Pool, classes, supports, draw_kinds, uniform, jitter: float) -> tuple[Pair, ...]:
    """Every annotation of every class on every support image gets the prompts that `draw_kinds()` names."""
    pairs = []
    for position, image in enumerate(supports):
        visible = pool.classes_in[image]
        for slot, category in enumerate(classes):
            if category not in visible:
                continue
            masks: list[int] = []
            points: list[tuple[float, float, int]] = []
            boxes: list[tuple[float, float, float, float]] = []
            for annotation in pool.annotations_of(image, category):
                for kind in draw_kinds():
                    if kind == "mask":
                        masks.append(annotation.id)
                    elif kind == "point":
                        points += pool.interior(annotation).points(uniform)
                    else:
                        boxes.append(_jittered(annotation.box, jitter, pool.dataset.images[image], uniform))
            pairs.append(Pair(position, slot, tuple(masks), tuple(points), tuple(boxes)))
    return tuple(pairs)


def _jittered(box, share: float, image, uniform) -> tuple[float, float, float, float]:
    """`box` with each side moved by N(0, share x side), at most 20 px, kept inside the photo, on eighths of a pixel."""
    x0, y0, x1, y1 = box
    if share:
        moves = []
        for side in (x1 - x0, y1 - y0, x1 - x0, y1 - y0):
            normal = math.sqrt(-2 * math.log(1 - uniform())) * math.cos(2 * math.pi * uniform())
            moves.append(min(max(normal * share * side, -20.0), 20.0))
        x0, x1 = sorted((x0 + moves[0], x1 + moves[2]))
        y0, y1 = sorted((y0 + moves[1], y1 + moves[3]))
    x0, x1 = (round(8 * min(max(v, 0.0), image.width)) / 8 for v in (x0, x1))
    y0, y1 = (round(8 * min(max(v, 0.0), image.height)) / 8 for v in (y0, y1))
    return x0, y0, x1, y1
