"""Draws one synthetic scene: textured objects over a cluttered background that belongs to no class.

Only numpy and Pillow are used, and every draw comes from the generator passed in, so that a scene is a
pure function of that generator's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Texture = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _polar(radii: np.ndarray, start: float = 0.0) -> np.ndarray:
    angles = start + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _corners(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    return np.stack([x, y], axis=1).astype(float)


def _crescent() -> np.ndarray:
    outer = np.linspace(0.2 * np.pi, 1.8 * np.pi, 40)
    inner = np.linspace(1.72 * np.pi, 0.28 * np.pi, 40)
    x = np.concatenate([np.cos(outer), 0.42 + 0.68 * np.cos(inner)])
    return _corners(x, np.concatenate([np.sin(outer), 0.76 * np.sin(inner)]))


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 16


# Closed outlines, (vertices, 2) as x, y, inside or close to the unit circle; y grows downwards.
SHAPES: dict[str, np.ndarray] = {
    "disc": _polar(np.full(48, 0.92)),
    "square": _polar(np.full(4, 1.05), np.pi / 4),
    "triangle": _polar(np.full(3, 1.1), np.pi / 6),
    "star": _polar(np.tile([1.08, 0.45], 5)),
    "cross": _corners(
        x=(-1, -0.34, -0.34, 0.34, 0.34, 1, 1, 0.34, 0.34, -0.34, -0.34, -1),
        y=(-0.34, -0.34, -1, -1, -0.34, -0.34, 0.34, 0.34, 1, 1, 0.34, 0.34),
    ),
    "crescent": _crescent(),
    "heart": _heart(),
    "arrow": _corners(x=(-1, 0.05, 0.05, 1.05, 0.05, 0.05, -1), y=(-0.32, -0.32, -0.9, 0, 0.9, 0.32, 0.32)),
    "bar": _corners(x=(-1.05, 1.05, 1.05, -1.05), y=(-0.42, -0.42, 0.42, 0.42)),
    "hourglass": _corners(x=(-0.85, 0.85, 0.2, 0.85, -0.85, -0.2), y=(-0.95, -0.95, 0, 0.95, 0.95, 0)),
}


def _speckle(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grains = rng.random((64, 64)) < 0.45
    return grains[(np.floor(u * 2.6).astype(int)) % 64, (np.floor(v * 2.6).astype(int)) % 64].astype(float)


def _soft(level: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 2.0 * level, 0, 1)


# How much of an object's second colour (0..1) is seen at u, v: the object's own rotated axes, origin at
# its centre, one unit the texture's period.
TEXTURES: dict[str, Texture] = {
    "plain": lambda u, v, rng: np.zeros_like(u),
    "striped": lambda u, v, rng: _soft(np.sin(2 * np.pi * u)),
    "checked": lambda u, v, rng: _soft(1.5 * np.sin(np.pi * 1.3 * u) * np.sin(np.pi * 1.3 * v)),
    "dotted": lambda u, v, rng: _soft(2.2 * (0.3 - np.hypot(u % 1 - 0.5, v % 1 - 0.5))),
    "latticed": lambda u, v, rng: _soft(4 * (0.13 - np.minimum(np.abs(0.8 * u % 1 - 0.5), np.abs(0.8 * v % 1 - 0.5)))),
    "ringed": lambda u, v, rng: _soft(np.sin(2 * np.pi * np.hypot(u, v))),
    "wavy": lambda u, v, rng: _soft(np.sin(2 * np.pi * (u + 0.35 * np.sin(np.pi * 1.1 * v)))),
    "speckled": _speckle,
}


@dataclass(frozen=True)
class Thing:
    """One object as drawn: its kind, and where it lies (pixels; angle in radians)."""

    shape: int
    texture: int
    centre: tuple[float, float]
    diameter: float
    angle: float
    colours: np.ndarray


@dataclass(frozen=True)
class Scene:
    """``image`` (H, W, 3) uint8; ``instances`` (H, W) uint8: 0 for none, k for ``things[k - 1]``."""

    image: np.ndarray
    instances: np.ndarray
    things: list[Thing]


def _contrasting(rng: np.random.Generator, others: Sequence[np.ndarray], distance: float) -> np.ndarray:
    while True:
        colour = rng.random(3)
        if all(np.linalg.norm(colour - other) >= distance for other in others):
            return colour
        distance *= 0.97  # three far-apart colours may leave no room for a fourth


def _cover(outline: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, tuple[slice, slice], float]:
    """Coverage (0..1) of a pixel-unit outline within the image, the window it fills, and its full area."""
    x0, y0 = np.floor(outline.min(0)).astype(int) - 1
    x1, y1 = np.ceil(outline.max(0)).astype(int) + 1
    scale = 4
    tile = Image.new("L", ((x1 - x0) * scale, (y1 - y0) * scale))
    ImageDraw.Draw(tile).polygon([tuple(p) for p in ((outline - (x0, y0)) * scale).tolist()], fill=255)
    cover = np.asarray(tile.reduce(scale), np.float32) / 255
    top, left = max(y0, 0), max(x0, 0)
    bottom, right = max(min(y1, size[0]), top), max(min(x1, size[1]), left)
    inside = cover[top - y0 : bottom - y0, left - x0 : right - x0]
    return inside, (slice(top, bottom), slice(left, right)), float(cover.sum())


def _blob(rng: np.random.Generator) -> np.ndarray:
    angle = 2 * np.pi * np.arange(40) / 40
    radius = np.ones(40)
    for wave in (1, 2, 3, 4):
        radius += rng.normal(0, 0.16) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return _polar(np.clip(radius, 0.25, 1.8))


def _background(rng: np.random.Generator, size: tuple[int, int], base: np.ndarray) -> np.ndarray:
    height, width = size
    side = min(size)
    coarse = (rng.random((5, 5, 3)) * 255).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    canvas = base + 0.35 * (smooth / 255 - 0.5)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(2):
        angle, period = rng.uniform(0, np.pi), rng.uniform(0.04, 0.15) * side
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + rng.uniform(0, 6))
        canvas = canvas + (wave * rng.uniform(0, 0.09))[..., None] * rng.uniform(0.5, 1, 3)
    for _ in range(rng.integers(3, 8)):
        place = rng.random(2) * (width, height)
        cover, window, _ = _cover(place + _blob(rng) * rng.uniform(0.05, 0.16) * side, size)
        fill = rng.random(3) + (y[window] - place[1])[..., None] / side * rng.normal(0, 0.8, 3)
        alpha = (cover * rng.uniform(0.5, 0.95))[..., None]
        canvas[window] = canvas[window] * (1 - alpha) + fill * alpha
    sheet = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(sheet)
    for _ in range(rng.integers(2, 6)):
        points = rng.random((rng.integers(2, 5), 2)) * (width, height)
        pen.line(
            [tuple(p) for p in points.tolist()],
            fill=tuple(int(c) for c in rng.integers(0, 256, 3)),
            width=int(rng.integers(1, 1 + max(2, side // 42))),
        )
    return np.asarray(sheet, np.float32) / 255


def _paint(
    canvas: np.ndarray,
    cover: np.ndarray,
    window: tuple[slice, slice],
    thing: Thing,
    texture: Texture,
    rng: np.random.Generator,
) -> None:
    y, x = np.mgrid[window].astype(np.float32) + 0.5
    x, y = x - thing.centre[0], y - thing.centre[1]
    side = min(canvas.shape[:2])
    # The period grows slowly with the object: always several periods across it, and several pixels each.
    period = np.clip(0.12 * thing.diameter, 0.038 * side, 0.055 * side) * rng.uniform(0.9, 1.1)
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    second = texture((x * cos + y * sin) / period, (y * cos - x * sin) / period, rng)[..., None]
    fill = thing.colours[0] * (1 - second) + thing.colours[1] * second
    light = rng.normal(0, 0.18, 2) / thing.diameter
    fill = fill + (x * light[0] + y * light[1])[..., None]
    canvas[window] = canvas[window] * (1 - cover[..., None]) + fill * cover[..., None]


def compose(
    rng: np.random.Generator,
    kinds: Sequence[tuple[int, int]],
    size: tuple[int, int],
    outlines: Sequence[np.ndarray],
    textures: Sequence[Texture],
) -> Scene:
    """Draw a cluttered scene of objects, later ones in front; ``size`` is (height, width) in pixels.

    ``kinds`` holds positions in ``outlines`` and ``textures``.  Every object keeps at least 45 % of its
    area in sight; one for which no such place is found, even made smaller, is left out.
    """
    side = min(size)
    base = rng.random(3)
    canvas = _background(rng, size, base)
    instances = np.zeros(size, np.uint8)
    things: list[Thing] = []
    areas: list[float] = []
    for shape, texture in kinds:
        diameter = side * rng.uniform(0.32, 0.66 if len(kinds) < 4 else 0.55)
        for _attempt in range(16):
            angle = rng.uniform(0, 2 * np.pi)
            centre = rng.uniform(0.1, 0.9, 2) * (size[1], size[0])
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            cover, window, area = _cover(centre + outlines[shape] @ turn * diameter / 2, size)
            solid = cover >= 0.5
            after = instances.copy()
            after[window][solid] = len(things) + 1
            seen = np.bincount(after.ravel(), minlength=len(things) + 2)[1:]
            if all(seen[k] >= 0.45 * a for k, a in enumerate(areas)) and seen[-1] >= 0.6 * area:
                break
            diameter = max(diameter * 0.95, 0.2 * side)
        else:
            continue
        first = _contrasting(rng, [base], 0.45)
        second = _contrasting(rng, [base, first], 0.5)
        colours = np.stack([first, second])
        thing = Thing(shape, texture, tuple(centre.tolist()), float(diameter), float(angle), colours)
        _paint(canvas, cover, window, thing, textures[texture], rng)
        instances = after
        things.append(thing)
        areas.append(area)
    canvas = canvas + rng.normal(0, 0.02, canvas.shape)
    return Scene((np.clip(canvas, 0, 1) * 255).round().astype(np.uint8), instances, things)
