"""What episodes are drawn from: images by class, and pixels of an instance."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from itertools import accumulate

from la.data.coco import Annotation, Dataset, runs_of

MIN_AREA = 32 * 32  # pixels of a class that an image must show to count as showing it
CACHED = 10_000  # outlines, and annotated pairs, kept by a pool, whose memory does not grow with what is drawn
MAX_POINTS = 10  # points of one instance at most (section 5.2)


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
