"""Random outlines and textures, and measures of them that a backbone can be taught without any class."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from pipelines.demo.drawing import Texture


def random_outline(rng: np.random.Generator) -> np.ndarray:
    """A polygon of uneven corners about the origin, (vertices, 2), reaching to the unit circle."""
    corners = int(rng.integers(3, 11))
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners
    radii = rng.uniform(0.3, 1.0, corners)
    if rng.random() < 0.4:
        # Near-regular ones, with every other corner drawn in when their number allows it.
        radii = 1 - rng.uniform(0, 0.6) * (np.arange(corners) % 2) + rng.uniform(-0.12, 0.12, corners)
    points = np.stack([radii * np.cos(angles), rng.uniform(0.4, 1) * radii * np.sin(angles)], axis=1)
    if rng.random() < 0.5:
        # Chaikin's corner cutting: half of the outlines are round.
        for _ in range(3):
            ahead = np.roll(points, -1, axis=0)
            points = np.stack([0.75 * points + 0.25 * ahead, 0.25 * points + 0.75 * ahead], 1).reshape(-1, 2)
    if rng.random() < 0.35:
        # Bent along its length; the sides need vertices between the corners to bend with it.
        points = np.concatenate(
            [points + t * (np.roll(points, -1, axis=0) - points) for t in np.arange(8) / 8], axis=1
        ).reshape(-1, 2)
        turn, distance = points[:, 0] * rng.uniform(0.7, 1.6), 0.9 + points[:, 1]
        points = np.stack([distance * np.sin(turn), distance * np.cos(turn)], axis=1)
    points = points - (points.max(0) + points.min(0)) / 2
    return points * 1.05 / np.linalg.norm(points, axis=1).max()


def random_texture(rng: np.random.Generator) -> Texture:
    """A pattern of uneven waves, rays, spirals or grains, as ``drawing.TEXTURES`` are called."""
    kind = rng.integers(6)
    angles = rng.uniform(0, np.pi, 3)
    rates = rng.uniform(0.5, 1.25, 3)
    offset, sharpness = rng.uniform(-0.45, 0.45), rng.uniform(1, 3)
    arms = int(rng.integers(2, 7))
    stretch = rng.uniform(1.5, 4.0)
    slope = rng.uniform(0.1, 0.4)

    def pattern(u: np.ndarray, v: np.ndarray, noise: np.random.Generator) -> np.ndarray:
        waves = [
            np.sin(2 * np.pi * rate * (u * np.cos(angle) + v * np.sin(angle)))
            for rate, angle in zip(rates, angles, strict=True)
        ]
        if kind == 0:
            level = waves[0] + 0.8 * waves[1]
        elif kind == 1:
            level = np.maximum(waves[0] * waves[1], waves[2] - 0.3)
        elif kind == 2:
            level = np.sin(arms * np.arctan2(v, u) + 2 * np.pi * 0.5 * (rates[0] - 0.5) * np.hypot(u, v))
        elif kind == 3:
            level = np.maximum(np.abs(waves[0]), np.abs(waves[1])) - 0.85
        elif kind == 4:
            grains = noise.random((64, 64)) - 0.5 + offset / 3
            rows = np.floor(u * 4.5 / stretch).astype(int) % 64
            level = 3 * grains[rows, np.floor(v * 4.5).astype(int) % 64]
        else:
            level = slope * (u * np.cos(angles[0]) + v * np.sin(angles[0]))
            return np.clip(0.5 + level, 0, 1)
        return np.clip(0.5 + sharpness * (level - offset), 0, 1)

    return pattern


def _shares(power: np.ndarray, position: np.ndarray, edges: list[float]) -> list[float]:
    total = power.sum() + 1e-6
    return [float(power[(position >= low) & (position < high)].sum() / total) for low, high in pairwise(edges)]


def measure_outline(outline: np.ndarray) -> np.ndarray:
    """Measures (12,) of a closed outline that no turn, mirroring or scaling changes.

    The filled share of the circle around it, its elongation, its compactness, how far it reaches about
    its centre of mass (waves 1 to 8 around, as shares of the mean), and how uneven that reach is.
    """
    half = 48
    sheet = Image.new("1", (2 * half, 2 * half))
    points = outline - (outline.max(0) + outline.min(0)) / 2
    points = points / np.linalg.norm(points, axis=1).max()
    ImageDraw.Draw(sheet).polygon([tuple(p) for p in (points * (half - 1) + half).tolist()], fill=1)
    filled = np.asarray(sheet)
    y, x = np.nonzero(filled)
    places = np.stack([x, y], axis=1).astype(float)
    centre = places.mean(0)
    spread = np.linalg.eigvalsh(np.cov((places - centre).T))
    steps = np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1).sum() * half
    angles = 2 * np.pi * np.arange(64) / 64
    rays = np.arange(0, 2 * half, 0.5)
    columns = np.clip(centre[0] + rays * np.cos(angles)[:, None], 0, 2 * half - 1).astype(int)
    rows = np.clip(centre[1] + rays * np.sin(angles)[:, None], 0, 2 * half - 1).astype(int)
    reach = filled[rows, columns].sum(1) / 2 + 1
    waves = np.abs(np.fft.rfft(reach))[:9] / (reach.sum())
    return np.array(
        [
            filled.sum() / (np.pi * half**2),
            spread[0] / spread[1],
            4 * np.pi * filled.sum() / steps**2,
            *waves[1:],
            reach.std() / reach.mean(),
        ]
    )


def measure_texture(texture: Texture) -> np.ndarray:
    """Measures (14,) of a texture that no turn or mirroring changes.

    The second colour's share and its contrast, the shares of power by frequency and by repeats around
    the circle of directions, the density of edges, and how far the edges point at the object's centre.
    """
    axis = np.linspace(-3, 3, 72)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    second = texture(u, v, np.random.default_rng(0))
    window = np.hanning(72)[:, None] * np.hanning(72)
    power = np.abs(np.fft.fftshift(np.fft.fft2((second - second.mean()) * window))) ** 2
    rate = np.fft.fftshift(np.fft.fftfreq(72, 6 / 71))
    frequency, direction = np.hypot(rate[:, None], rate), np.arctan2(rate[:, None], rate)
    bands = _shares(power, frequency, [0, 0.35, 0.65, 0.95, 1.4, 2.2, 99])
    total = power.sum() + 1e-6
    repeats = [float(np.abs((power * np.exp(1j * k * direction)).sum()) / total) for k in (2, 4, 6)]
    down, across = np.gradient(second)
    steep = np.hypot(down, across)
    radial = (steep * np.cos(2 * (np.arctan2(down, across) - np.arctan2(v, u)))).sum() / (steep.sum() + 1e-6)
    return np.array([second.mean(), second.std(), *bands, *repeats, steep.mean(), radial, steep.max()])


def standardised(rows: np.ndarray) -> np.ndarray:
    """Columns brought to mean 0 and deviation 1, outliers cut off at 3: (N, K) float32."""
    return np.clip((rows - rows.mean(0)) / (rows.std(0) + 1e-6), -3, 3).astype(np.float32)
