"""Pictures wider than the captions' world, for the autoencoder alone.

What the VAE cannot express, no LoRA can teach. So it also learns arbitrary polygons, lobed and starred outlines,
nested colours, outlines and striped or graded backgrounds, in any colour.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from demo.world.world import IMAGE_PX, Canvas, Colour, Polygon


def draw_wider(rng: np.random.Generator) -> Image.Image:
    """One random 64 px RGB picture: one to three random figures on a plain, striped or graded background."""
    canvas = Canvas(_any_colour(rng))
    if rng.random() < 0.3:
        _stripe(canvas, rng)
    for _ in range(int(rng.integers(1, 4))):
        half = float(rng.uniform(5, 22))
        centre = tuple(rng.uniform(10, IMAGE_PX - 10, size=2))
        figure = _any_outline(rng)
        canvas.fill(_scaled(figure, half), centre, _any_colour(rng))
        if rng.random() < 0.5:  # a second colour inside: hearts of flowers, outlines, rings
            inner = figure if rng.random() < 0.5 else _lobed(rng)
            canvas.fill(_scaled(inner, half * float(rng.uniform(0.3, 0.85))), centre, _any_colour(rng))
    return canvas.picture()


def _any_colour(rng: np.random.Generator) -> Colour:
    r, g, b = (int(channel) for channel in rng.integers(0, 256, size=3))
    return (r, g, b)


def _stripe(canvas: Canvas, rng: np.random.Generator) -> None:
    colour, period = _any_colour(rng), float(rng.uniform(8, 24))
    slope = float(rng.uniform(-1, 1))
    for left in np.arange(-IMAGE_PX, 2 * IMAGE_PX, period):
        band: Polygon = [(left, 0), (left + period / 2, 0)]
        foot = slope * IMAGE_PX
        band += [(left + period / 2 + foot, IMAGE_PX), (left + foot, IMAGE_PX)]
        canvas.fill(band, (0.0, 0.0), colour)


def _any_outline(rng: np.random.Generator) -> Polygon:
    kind = rng.integers(0, 3)
    if kind == 0:
        return _lobed(rng)
    if kind == 1:
        return _starred(rng)
    return _freehand(rng)


def _lobed(rng: np.random.Generator) -> Polygon:
    lobes, depth, phase = int(rng.integers(1, 9)), rng.uniform(0, 0.45), rng.uniform(0, 2 * math.pi)
    turns = np.linspace(0, 2 * math.pi, 120, endpoint=False)
    radii = 1 - depth + depth * np.sqrt(np.abs(np.cos(lobes * turns / 2 + phase)))
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _starred(rng: np.random.Generator) -> Polygon:
    corners, inner, phase = int(rng.integers(3, 9)), rng.uniform(0.35, 1.0), rng.uniform(0, 2 * math.pi)
    turns = phase + np.arange(2 * corners) * math.pi / corners
    radii = np.where(np.arange(2 * corners) % 2 == 0, 1.0, inner)
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _freehand(rng: np.random.Generator) -> Polygon:
    turns = np.sort(rng.uniform(0, 2 * math.pi, size=int(rng.integers(3, 10))))
    radii = rng.uniform(0.3, 1.0, size=len(turns))
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _scaled(polygon: Polygon, scale: float) -> Polygon:
    return [(x * scale, y * scale) for x, y in polygon]
