"""Episodes and how they are drawn: pure functions of (protocol, fold, split, seed, index) (paper sections 3 and 4.4).

All chance comes from `random.Random(text).random()`, whose sequence Python guarantees for good, so an episode is the
same on every machine, with every number of workers, in whatever order episodes are drawn.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from typing import NamedTuple

from la.data.coco import Annotation, Dataset, runs_of
from la.episodes.protocols import QueryDraw
from la.errors import InputError, TooFewImages

MIN_AREA = 32 * 32  # pixels of a class that an image must show to count as showing it
CACHED = 10_000  # outlines, and annotated pairs, kept by a pool, whose memory does not grow with what is drawn
MAX_POINTS = 10  # points of one instance at most (section 5.2)
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


class Pool:
    """The images and classes that episodes of one fold and split are drawn from."""

    def __init__(self, dataset: Dataset, classes: Sequence[int], min_area: int = MIN_AREA):
        self.dataset = dataset
        self.classes = tuple(sorted(classes))
        by_class = dataset.images_by_class(min_area)
        self.images_of = {c: by_class[c] for c in self.classes}
        self.classes_in: dict[int, tuple[int, ...]] = {}
        for category in self.classes:
            for image in self.images_of[category]:
                self.classes_in[image] = (*self.classes_in.get(image, ()), category)
        self.annotations_of = lru_cache(CACHED)(partial(_prompted, dataset))  # (image, class) -> those that prompt
        self.interior = lru_cache(CACHED)(partial(_interior, dataset))  # annotation -> its Interior
        self._usable: dict[int, list[int]] = {}
        self._showing: dict[int, list[int]] = {}

    def usable(self, shots: int) -> list[int]:
        """The classes that have images enough for a query and `shots` supports."""
        if shots not in self._usable:
            self._usable[shots] = [c for c in self.classes if len(self.images_of[c]) > shots]
        return self._usable[shots]

    def images_showing(self, shots: int) -> list[int]:
        """The images that show a class usable with `shots` supports."""
        if shots not in self._showing:
            usable = set(self.usable(shots))
            self._showing[shots] = [i for i in sorted(self.classes_in) if usable & set(self.classes_in[i])]
        return self._showing[shots]

    def skipped(self, shots: int) -> dict[int, str]:
        """class -> why it cannot be drawn with `shots` supports."""
        return {
            c: f"{len(self.images_of[c])} images, {shots + 1} needed"
            for c in self.classes
            if len(self.images_of[c]) <= shots
        }

    @cached_property
    def by_richness(self) -> dict[int, tuple[list[int], list[int]]]:
        """class -> (its images, those that show most classes first; minus the number of classes each shows)."""
        trainable = set(self.usable(1))
        counts = {image: sum(c in trainable for c in shown) for image, shown in self.classes_in.items()}
        ordered = {c: sorted(self.images_of[c], key=lambda i: (-counts[i], i)) for c in self.classes}
        return {c: (images, [-counts[i] for i in images]) for c, images in ordered.items()}


class Interior:
    """Uniform draws of pixels inside one instance, straight from its run lengths."""

    __slots__ = ("area", "ends", "height", "mean_points", "starts")

    def __init__(self, annotation: Annotation, height: int, width: int):
        runs = runs_of(annotation, height, width)
        self.ends = list(accumulate(runs[1::2]))  # foreground pixels up to the end of each run
        self.starts = list(accumulate(runs))[0::2][: len(self.ends)]
        self.area = self.ends[-1]
        self.height = height
        self.mean_points = math.exp(-10 * math.sqrt(self.area / (height * width)))

    def points(self, uniform: Callable[[], float]) -> list[tuple[float, float, int]]:
        """clip(Poisson(10 sqrt(area share)) + 1, 1, 10) points, (x, y, 1) at pixel centres."""
        count, product = 1, uniform()
        while product > self.mean_points and count < MAX_POINTS:
            count += 1
            product *= uniform()
        drawn = []
        for _ in range(count):
            k = int(uniform() * self.area)
            run = bisect_right(self.ends, k)
            x, y = divmod(self.starts[run] + k - (self.ends[run - 1] if run else 0), self.height)
            drawn.append((x + 0.5, y + 0.5, 1))
        return drawn


def _prompted(dataset: Dataset, image: int, category: int) -> tuple[Annotation, ...]:
    """The annotations of a class on an image that may serve as prompts: no crowds."""
    return tuple(one for one in dataset.annotations[image] if one.category_id == category and not one.is_crowd)


def _interior(dataset: Dataset, annotation: Annotation) -> Interior:
    image = dataset.images[annotation.image_id]
    return Interior(annotation, image.height, image.width)


def evaluation_episode(
    pool: Pool,
    name: str,
    index: int,
    ways: int,
    shots: int,
    prompt: str,
    varied: bool = False,
    query_draw: QueryDraw = "class",
    retrieve: Retrieve | None = None,
) -> Episode:
    """Episode `index` of a test protocol: N-way K-shot, prompts "mask", "point", "box", "point_box" or "mixed".

    A class is drawn uniformly, then a query that shows it, then the other classes, then K supports of each; for other
    ways to draw the query see `la.episodes.protocols`. `name` says protocol, fold, split and seed. Classes, query and
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
    if query_draw == "run":
        usable = _sample(usable, ways, random.Random(f"{name}/{ways}/{shots}/classes").random)
    if query_draw == "image":
        query = _pick(pool.images_showing(shots), uniform)
        first = _pick([c for c in pool.classes_in[query] if c in usable], uniform)
    else:
        first = _pick(usable, uniform)
        query = _pick(pool.images_of[first], uniform)
    others = [c for c in usable if c != first]
    classes = [first, *_sample(others, ways - 1, uniform)]
    _shuffle(classes, uniform)
    supports = _draw_supports(pool, classes, query, shots, uniform, varied, retrieve)
    kinds = ("point", "box") if prompt == "point_box" else (prompt,)
    uniform = random.Random(f"{name}/{index}/{ways}/{shots}/prompts").random
    draw_kinds = (lambda: (_pick(PROMPT_KINDS, uniform),)) if prompt == "mixed" else (lambda: kinds)
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
    first = _pick(usable, uniform)
    images, minus_counts = pool.by_richness[first]
    wanted = min(1 + int(uniform() * ways), -minus_counts[0])
    query = images[int(uniform() * bisect_right(minus_counts, -wanted))]
    inside = [c for c in pool.classes_in[query] if len(pool.images_of[c]) > 1]
    classes = [first, *_sample([c for c in inside if c != first], wanted - 1, uniform)]
    outside = [c for c in usable if c not in inside]
    classes += _sample(outside, ways - wanted, uniform)
    if len(classes) < ways:  # an image that shows nearly every class
        classes += _sample([c for c in inside if c not in classes], ways - len(classes), uniform)
    _shuffle(classes, uniform)
    supports = _draw_supports(pool, classes, query, shots, uniform)
    kinds = _pick([kinds for kinds in PROMPT_SETS if set(kinds) <= set(prompts)], uniform)
    pairs = _prompt_pairs(pool, classes, supports, lambda: (_pick(kinds, uniform),), uniform, jitter)
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
                image = _pick(images, uniform)
                if image not in taken:
                    taken.add(image)
                    drawn.append(image)
        else:
            drawn = _sample([i for i in images if i not in taken], wanted, uniform)
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


def _pick(items, uniform):
    return items[int(uniform() * len(items))]


def _sample(items, count: int, uniform) -> list:
    """`count` different items in random order, fewer where there are fewer."""
    rest = list(items)
    drawn = []
    for _ in range(min(count, len(rest))):
        k = int(uniform() * len(rest))
        drawn.append(rest[k])
        rest[k] = rest[-1]
        rest.pop()
    return drawn


def _shuffle(items: list, uniform) -> None:
    items[:] = _sample(items, len(items), uniform)
