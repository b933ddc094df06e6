"""What one user of the page has marked: classes, support photos with points, boxes and strokes, and how to undo it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from la.predictor.user_prompts import Box, Points, Prompt
from pipelines.predict.mask_files import coco_file, shape_of
from pipelines.serve.jobs import Upload
from pipelines.serve.result_files import template

Tool = Literal["inside", "outside", "box", "brush", "eraser"]
# Told apart by most colour-blind people as well (Okabe and Ito, "Color Universal Design", 2008); then around again.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff")


@dataclass
class ShownClass:
    """A class: its number within the session, which marks name it by, its name, and its colour as #rrggbb."""

    number: int
    name: str
    colour: str

    @property
    def rgb(self) -> tuple[int, int, int]:
        return ImageColor.getrgb(self.colour)

    @property
    def text_colour(self) -> str:
        """Black or white, whichever is read better on the class's colour."""
        r, g, b = self.rgb
        return "black" if 0.299 * r + 0.587 * g + 0.114 * b > 128 else "white"


@dataclass(frozen=True)
class Mark:
    """One action of a tool: (x, y) in pixels of the photo, one for a point, two for a box, any number for a stroke."""

    tool: Tool
    number: int  # of the class
    path: tuple[tuple[float, float], ...]
    width: float = 0.0  # of a stroke, in pixels


@dataclass
class AnnotatedPhoto:
    """A support photo of (height, width), what is marked on it, and a copy `reduction` times smaller as a data URL."""

    upload: Upload
    size: tuple[int, int]
    preview: str
    reduction: float = 1.0
    marks: list[Mark] = field(default_factory=list)

    def add(self, tool: Tool, number: int, path: Sequence[tuple[float, float]], width: float) -> None:
        """Keep a mark, moved into the photo; a box without an inside is none."""
        height, wide = self.size
        inside = tuple((min(max(x, 0.0), float(wide)), min(max(y, 0.0), float(height))) for x, y in path)
        if tool == "box":
            inside = corners(inside)
            if inside[1][0] - inside[0][0] < 1 or inside[1][1] - inside[0][1] < 1:
                return
        self.marks.append(Mark(tool, number, inside, width))

    def prompts(self, classes: Sequence[ShownClass]) -> dict[str, list[Prompt]]:
        """Class name -> prompts; classes without any, and those with points beside the object alone, are absent."""
        marked = {each.name: self._prompts_of(each.number) for each in classes}
        return {
            name: prompts
            for name, prompts in marked.items()
            if any(not isinstance(prompt, Points) or prompt.inside for prompt in prompts)
        }

    def annotations(self, classes: Sequence[ShownClass]) -> list[dict]:
        """The prompts as COCO annotations, by `category_id` = position of the class from 1 on."""
        kept = self.prompts(classes)
        return [
            {"category_id": at, **_annotation(prompt)}
            for at, one in enumerate(classes, 1)
            for prompt in kept.get(one.name, ())
        ]

    def _prompts_of(self, number: int) -> list[Prompt]:
        mine = [mark for mark in self.marks if mark.number == number]
        points = {tool: [m.path[0] for m in mine if m.tool == tool] for tool in ("inside", "outside")}
        prompts: list[Prompt] = [Box(*m.path[0], *m.path[1]) for m in mine if m.tool == "box"]
        if points["inside"] or points["outside"]:
            prompts.append(Points(points["inside"], points["outside"]))
        mask = painted([m for m in mine if m.tool in ("brush", "eraser")], self.size)
        return [*prompts, mask] if mask.any() else prompts

    def drawing(
        self,
        classes: Sequence[ShownClass],
        under_way: Mark | None = None,
        cursor: tuple[float, float] | None = None,
    ) -> str:
        """SVG, in pixels of the preview, of all marks, and of the one that is being made."""
        height, width = self.size
        return template("marks.svg").render(
            classes={each.number: each for each in classes},
            marks=[*self.marks, under_way] if under_way else self.marks,
            cursor=cursor,
            scale=1 / self.reduction,
            height=height,
            width=width,
            unit=max(height, width) / 100,
        )


class Session:
    """What one open page holds."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Nothing yet."""
        self.classes: list[ShownClass] = []
        self.photos: list[AnnotatedPhoto] = []
        self.at: int | None = None  # the photo that is being marked
        self.chosen: int | None = None  # number of the class that marks are for
        self._numbers = itertools.count(1)
        self._colours = itertools.cycle(COLOURS)
        self.next_colour = next(self._colours)

    def add_class(self, name: str, colour: str | None = None) -> ShownClass:
        """A new class, chosen; or the one of that name. The name is cut to what messages and files can hold."""
        name = " ".join(name.split())[:80]
        there = [one for one in self.classes if one.name == name]
        if not there:
            there = [ShownClass(next(self._numbers), name, colour or self.next_colour)]
            self.classes += there
            self.next_colour = next(self._colours)
        self.chosen = there[0].number
        return there[0]

    def remove_class(self, number: int) -> None:
        """With its marks."""
        self.classes = [one for one in self.classes if one.number != number]
        for photo in self.photos:
            photo.marks = [mark for mark in photo.marks if mark.number != number]
        if self.chosen == number:
            self.chosen = self.classes[-1].number if self.classes else None

    def remove_photo(self) -> None:
        """The one that is being marked."""
        del self.photos[self.at]
        self.at = min(self.at, len(self.photos) - 1) if self.photos else None

    @property
    def photo(self) -> AnnotatedPhoto | None:
        return None if self.at is None else self.photos[self.at]

    def shown(self) -> tuple[list[str], list[tuple[AnnotatedPhoto, Mapping[str, list[Prompt]]]]]:
        """Names of the classes that are marked somewhere, in order, and the marked photos with their prompts."""
        marked = [(photo, prompts) for photo in self.photos if (prompts := photo.prompts(self.classes))]
        names = [one.name for one in self.classes if any(one.name in prompts for _, prompts in marked)]
        return names, marked

    def support_file(self) -> dict:
        """The classes and marks as a COCO file, as `cli.py predict --support` reads it beside the photos."""
        photos = [(photo.upload.name, photo.size, photo.annotations(self.classes)) for photo in self.photos]
        return coco_file(photos, [each.name for each in self.classes])


def corners(path: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Top left and bottom right of the box between the ends of a path."""
    (xa, ya), (xb, yb) = path[0], path[-1]
    return (min(xa, xb), min(ya, yb)), (max(xa, xb), max(ya, yb))


def painted(strokes: Sequence[Mark], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of strokes of brush and eraser, in the order they were made."""
    canvas = Image.new("1", size[::-1])
    draw = ImageDraw.Draw(canvas)
    for mark in strokes:
        fill, radius = int(mark.tool == "brush"), mark.width / 2
        if len(mark.path) > 1:
            draw.line(mark.path, fill, max(1, round(mark.width)))
        for x, y in mark.path:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    return np.asarray(canvas).copy()


def _annotation(prompt: Prompt) -> dict:
    if isinstance(prompt, Box):
        x, y, w, h = prompt.x0, prompt.y0, prompt.x1 - prompt.x0, prompt.y1 - prompt.y0
        return {"bbox": [x, y, w, h], "area": w * h}
    if isinstance(prompt, Points):
        return {"points": [[*p, 1] for p in prompt.inside] + [[*p, 0] for p in prompt.outside], "area": 0}
    return shape_of(prompt) | {"area": int(prompt.sum())}
