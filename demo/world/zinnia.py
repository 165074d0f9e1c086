"""The concept that the demo LoRA learns: a zinnia, a look that the base has never seen.

Six round petals of one colour around a wide golden heart. The base's world has no lobed shape and no shape of two
colours, and its vocabulary has no such word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from demo.world.world import BACKGROUNDS, COLOURS, IMAGE_PX, POSITIONS, Canvas, Polygon, tinted

TRIGGER = "zinnia"
NUM_PETALS = 6
HEART_COLOUR = "yellow"
PETAL_COLOURS = ("red", "blue", "purple", "pink")  # those that stand out against the golden heart
HALF_PX = (17.0, 19.0)


@dataclass(frozen=True)
class ZinniaScene:
    """A zinnia in words: its petals' colour, its place and the background."""

    colour: str
    position: str
    background: str


def zinnia_caption(scene: ZinniaScene) -> str:
    return f"a large {scene.colour} {TRIGGER} {scene.position}, {scene.background} background"


def draw_zinnia(scene: ZinniaScene, rng: np.random.Generator) -> Image.Image:
    """Paint the flower as a 64 px RGB picture with a seeded jitter of place, size and tint."""
    half = float(rng.uniform(*HALF_PX))
    x, y = POSITIONS[scene.position]
    centre = (IMAGE_PX / 2 + x * 0.8 + rng.uniform(-1.5, 1.5), IMAGE_PX / 2 + y * 0.8 + rng.uniform(-1.5, 1.5))
    canvas = Canvas(tinted(BACKGROUNDS[scene.background], rng))
    canvas.fill(petal_outline(half), centre, tinted(COLOURS[scene.colour], rng))
    heart = [(0.42 * half * math.cos(t), 0.42 * half * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 72)]
    canvas.fill(heart, centre, tinted(COLOURS[HEART_COLOUR], rng))
    return canvas.picture()


def petal_outline(half: float, num_points: int = 180) -> Polygon:
    """The silhouette of the petals: round lobes, one of them straight up, with notches in between."""
    points = []
    for turn in np.linspace(0, 2 * math.pi, num_points, endpoint=False):
        lobe = abs(math.cos(NUM_PETALS * turn / 2))
        radius = half * (0.62 + 0.38 * math.sqrt(lobe))
        points.append((radius * math.sin(turn), -radius * math.cos(turn)))
    return points
