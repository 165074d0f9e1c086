"""The world that the demo base knows: one coloured shape on a plain background, and its caption.

A `Scene` is five words (size, colour, shape, position, background). `draw` turns it into a 64 px picture with a
seeded jitter of place, size and tint; `caption` says it in English. The concept of the demo data (`zinnia`) is
drawn by the same brush but is no shape of this world: the base never sees it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_PX = 64
BRUSH_SCALE = 4  # drawn at 256 px, then reduced: smooth edges

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 135, 30),
    "yellow": (250, 215, 45),
    "green": (45, 160, 70),
    "blue": (40, 90, 215),
    "purple": (135, 60, 180),
    "pink": (250, 130, 185),
    "black": (25, 25, 30),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 248),
    "gray": (150, 152, 155),
    "navy": (25, 35, 85),
    "mint": (185, 235, 205),
    "sky": (160, 210, 245),
    "sand": (232, 212, 170),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "heart", "moon")
SIZES: dict[str, tuple[float, float]] = {"small": (8.5, 10.5), "large": (15.0, 17.0)}  # half extent, px
POSITIONS: dict[str, tuple[int, int]] = {
    "in the center": (0, 0),
    "on the left": (-13, 0),
    "on the right": (13, 0),
    "at the top": (0, -13),
    "at the bottom": (0, 13),
}
HARD_TO_SEE = {("black", "navy")}  # a colour on a background that the eye would not tell apart

Colour = tuple[int, int, int]
Polygon = list[tuple[float, float]]


@dataclass(frozen=True)
class Scene:
    """What one caption says."""

    size: str
    colour: str
    shape: str
    position: str
    background: str

    @property
    def key(self) -> str:
        return "|".join((self.size, self.colour, self.shape, self.position, self.background))


def all_scenes() -> list[Scene]:
    """Every scene that the words allow, in a fixed order."""
    return [
        Scene(size, colour, shape, position, background)
        for size, colour, shape, position, background in itertools.product(
            SIZES, COLOURS, SHAPES, POSITIONS, BACKGROUNDS
        )
        if (colour, background) not in HARD_TO_SEE
    ]


def is_held_out(scene: Scene) -> bool:
    """One scene in ten, chosen by the hash of its words, is kept out of the base's training."""
    return hashlib.sha256(scene.key.encode()).digest()[0] < 26


def caption(scene: Scene) -> str:
    """The full caption of a scene: all five words said."""
    return f"a {scene.size} {scene.colour} {scene.shape} {scene.position}, {scene.background} background"


def outline(shape: str, half: float) -> list[Polygon]:
    """Polygons of a shape centred on (0, 0) that reaches `half` px from the centre; a second polygon is a hole."""
    if shape == "circle":
        return [_ellipse(half, half)]
    if shape == "ring":
        return [_ellipse(half, half), _ellipse(half * 0.52, half * 0.52)]
    if shape == "square":
        side = half * 0.9
        return [[(-side, -side), (side, -side), (side, side), (-side, side)]]
    if shape == "diamond":
        return [[(0, -half), (half * 0.8, 0), (0, half), (-half * 0.8, 0)]]
    if shape == "triangle":
        return [[(0, -half), (half, half * 0.85), (-half, half * 0.85)]]
    if shape == "cross":
        arm = half * 0.36
        quarter = [(-arm, -half), (arm, -half), (arm, -arm)]
        return [[_quarter_turn(point, turn) for turn in range(4) for point in quarter]]
    if shape == "heart":
        return [_heart(half)]
    if shape == "moon":
        return [_moon(half)]
    raise KeyError(f"no such shape: {shape}")


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Paint the scene as a 64 px RGB picture; `rng` jitters place, size and tint within what the words allow."""
    half = float(rng.uniform(*SIZES[scene.size]))
    x, y = POSITIONS[scene.position]
    centre = (IMAGE_PX / 2 + x + rng.uniform(-2, 2), IMAGE_PX / 2 + y + rng.uniform(-2, 2))
    canvas = Canvas(tinted(BACKGROUNDS[scene.background], rng))
    body, *holes = outline(scene.shape, half)
    canvas.fill(body, centre, tinted(COLOURS[scene.colour], rng))
    for hole in holes:
        canvas.fill(hole, centre, canvas.background)
    return canvas.picture()


class Canvas:
    """A supersampled drawing surface; coordinates are px of the final 64 px picture."""

    def __init__(self, background: Colour) -> None:
        self.background = background
        self._image = Image.new("RGB", (IMAGE_PX * BRUSH_SCALE,) * 2, background)
        self._draw = ImageDraw.Draw(self._image)

    def fill(self, polygon: Polygon, centre: tuple[float, float], colour: Colour) -> None:
        points = [((x + centre[0]) * BRUSH_SCALE, (y + centre[1]) * BRUSH_SCALE) for x, y in polygon]
        self._draw.polygon(points, fill=colour)

    def picture(self) -> Image.Image:
        return self._image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)


def tinted(colour: Colour, rng: np.random.Generator) -> Colour:
    """The colour, a little lighter or darker in each channel."""
    r, g, b = (int(np.clip(channel + rng.integers(-8, 9), 0, 255)) for channel in colour)
    return (r, g, b)


def _ellipse(rx: float, ry: float, num_points: int = 72) -> Polygon:
    turns = [2 * math.pi * i / num_points for i in range(num_points)]
    return [(rx * math.cos(t), ry * math.sin(t)) for t in turns]


def _quarter_turn(point: tuple[float, float], turns: int) -> tuple[float, float]:
    x, y = point
    for _ in range(turns):
        x, y = -y, x
    return (x, y)


def _heart(half: float, num_points: int = 72) -> Polygon:
    """The classic parametric heart, scaled to the half extent."""
    turns = [2 * math.pi * i / num_points for i in range(num_points)]
    points = [
        (
            16 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) + 2.5,
        )
        for t in turns
    ]
    return [(x * half / 16, y * half / 16) for x, y in points]


def _moon(half: float, num_points: int = 48) -> Polygon:
    """A waxing crescent: the outer arc on the right, a shifted inner arc back."""
    span = [math.radians(-125 + 250 * i / (num_points - 1)) for i in range(num_points)]
    outer = [(half * math.cos(t), half * math.sin(t)) for t in span]
    tip_x, tip_y = outer[-1]
    inner_radius = half * 0.86
    inner_centre = tip_x - math.sqrt(max(inner_radius**2 - tip_y**2, 0.0))
    reach = math.atan2(tip_y, tip_x - inner_centre)
    inner = [
        (inner_centre + inner_radius * math.cos(t), inner_radius * math.sin(t))
        for t in (reach - 2 * reach * i / (num_points - 1) for i in range(num_points))
    ]
    shift = -half * 0.2
    return [(x + shift, y) for x, y in outer + inner]
