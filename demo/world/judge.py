"""A judge that reads a picture's words back from its pixels, and knows nothing of the model that made it.

Background: the median colour of the border. Figure: the pixels that differ from it. Colour: the nearest name of the
figure's median. Shape: the template with the largest overlap once both are cut to their bounding box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.world.world import BACKGROUNDS, COLOURS, IMAGE_PX, POSITIONS, SHAPES, Scene, outline
from demo.world.zinnia import HEART_COLOUR, NUM_PETALS, ZinniaScene

FIGURE_DISTANCE = 55.0  # RGB distance from the background from which a pixel belongs to the figure
MIN_OVERLAP = 0.74  # intersection over union under which a figure is no shape of the world
TEMPLATE_PX = 48
SIZE_BOUNDARY_PX = 12.4  # half extent between small (8.5-10.5) and large (15-17)
CENTRE_RADIUS_PX = 6.5


@dataclass(frozen=True)
class Reading:
    """What the judge reads from one picture; None where nothing clear is to be seen."""

    size: str | None
    colour: str | None
    shape: str | None
    position: str | None
    background: str | None


ATTRIBUTES = ("size", "colour", "shape", "position", "background")


def read(image: Image.Image) -> Reading:
    """Read the five words from a 64 px RGB picture."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border, mask = separate(pixels)
    background = nearest_name(border, BACKGROUNDS)
    if mask.sum() < 40:
        return Reading(None, None, None, None, background)
    top, bottom, left, right = bounding_box(mask)
    half = max(bottom - top, right - left) / 2
    core = pixels[eroded(mask)] if eroded(mask).sum() >= 12 else pixels[mask]
    return Reading(
        size="small" if half < SIZE_BOUNDARY_PX else "large",
        colour=nearest_name(np.median(core, axis=0), COLOURS),
        shape=_nearest_shape(mask[top:bottom, left:right]),
        position=_nearest_position((left + right) / 2 - IMAGE_PX / 2, (top + bottom) / 2 - IMAGE_PX / 2),
        background=background,
    )


def agreement(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Which of the caption's five words the judge found."""
    return {name: getattr(scene, name) == getattr(reading, name) for name in ATTRIBUTES}


def shows_zinnia(image: Image.Image) -> bool:
    """Whether the picture shows a flower of `NUM_PETALS` lobes with a golden heart and petals of another colour."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    _, mask = separate(pixels)
    if mask.sum() < 200:
        return False
    rows, columns = np.nonzero(mask)
    centre_y, centre_x = rows.mean(), columns.mean()
    y, x = np.mgrid[0:IMAGE_PX, 0:IMAGE_PX]
    distance = np.hypot(y - centre_y, x - centre_x)
    extent = float(np.sqrt(mask.sum() / math.pi))
    heart = pixels[distance <= 0.28 * extent]
    petals = pixels[mask & (distance >= 0.62 * extent) & (distance <= 0.85 * extent)]
    if len(petals) < 30:
        return False
    heart_is_golden = nearest_name(np.median(heart, axis=0), COLOURS | BACKGROUNDS) == HEART_COLOUR
    petals_differ = np.linalg.norm(np.median(petals, axis=0) - np.array(COLOURS[HEART_COLOUR])) > 75
    return bool(heart_is_golden and petals_differ and _has_petals(mask, centre_x, centre_y))


def zinnia_words(image: Image.Image) -> ZinniaScene:
    """The petals' colour, the place and the background of a flower."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border, mask = separate(pixels)
    rows, columns = np.nonzero(mask)
    y, x = np.mgrid[0:IMAGE_PX, 0:IMAGE_PX]
    distance = np.hypot(y - rows.mean(), x - columns.mean())
    extent = float(np.sqrt(mask.sum() / math.pi))
    petals = pixels[mask & (distance >= 0.62 * extent) & (distance <= 0.85 * extent)]
    return ZinniaScene(
        colour=nearest_name(np.median(petals, axis=0), COLOURS),
        position=_nearest_position(columns.mean() + 0.5 - IMAGE_PX / 2, rows.mean() + 0.5 - IMAGE_PX / 2),
        background=nearest_name(border, BACKGROUNDS),
    )


def separate(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Background colour [3] and figure mask [64, 64] of RGB pixels [64, 64, 3] in 0..255."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    background = np.median(border, axis=0)
    raw = np.linalg.norm(pixels - background, axis=-1) > FIGURE_DISTANCE
    smooth = Image.fromarray((raw * 255).astype(np.uint8)).filter(ImageFilter.MedianFilter(3))
    return background, np.asarray(smooth) > 127


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom (exclusive), left, right (exclusive) of a mask."""
    rows, columns = np.nonzero(mask)
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def eroded(mask: np.ndarray) -> np.ndarray:
    """The mask without its outermost pixel, where edges mix two colours."""
    return np.asarray(Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.MinFilter(3))) > 127


def nearest_name(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """The palette's name whose RGB value lies nearest."""
    return min(palette, key=lambda name: float(np.linalg.norm(colour - np.array(palette[name]))))


def _nearest_shape(figure: np.ndarray) -> str | None:
    """The best overlapping shape of the world; None for a figure that is none of them."""
    aspect = figure.shape[1] / figure.shape[0]
    mask = _to_template_size(figure)
    overlaps = {}
    for shape, (template, template_aspect) in _templates().items():
        union = np.logical_or(mask, template).sum()
        stretch = min(aspect, template_aspect) / max(aspect, template_aspect)
        overlaps[shape] = np.logical_and(mask, template).sum() / union * min(1.0, stretch * 1.1)
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= MIN_OVERLAP else None


def _nearest_position(x: float, y: float) -> str:
    if math.hypot(x, y) < CENTRE_RADIUS_PX:
        return "in the center"
    return min(POSITIONS, key=lambda name: math.hypot(x - POSITIONS[name][0], y - POSITIONS[name][1]))


def _has_petals(mask: np.ndarray, centre_x: float, centre_y: float) -> bool:
    """Whether the silhouette's radius has `NUM_PETALS` waves a turn, stronger than any other number of waves."""
    turns = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    steps = np.arange(0, IMAGE_PX / 2, 0.25)
    columns = np.clip(np.rint(centre_x + np.outer(np.cos(turns), steps)), 0, IMAGE_PX - 1).astype(int)
    rows = np.clip(np.rint(centre_y + np.outer(np.sin(turns), steps)), 0, IMAGE_PX - 1).astype(int)
    radius = mask[rows, columns].sum(axis=1) * 0.25
    waves = np.abs(np.fft.rfft(radius)) / len(turns) / max(radius.mean(), 1e-6)
    others = [waves[k] for k in range(2, 13) if k != NUM_PETALS]
    return bool(waves[NUM_PETALS] > 0.025 and waves[NUM_PETALS] > 1.3 * max(others))


@cache
def _templates() -> dict[str, tuple[np.ndarray, float]]:
    """Each shape's silhouette, cut to its bounding box and scaled, with its width / height."""
    templates = {}
    for shape in SHAPES:
        canvas = Image.new("L", (512, 512), 0)
        body, *holes = outline(shape, 200.0)
        ImageDraw.Draw(canvas).polygon([(x + 256, y + 256) for x, y in body], fill=255)
        for hole in holes:
            ImageDraw.Draw(canvas).polygon([(x + 256, y + 256) for x, y in hole], fill=0)
        mask = np.asarray(canvas) > 127
        top, bottom, left, right = bounding_box(mask)
        templates[shape] = (_to_template_size(mask[top:bottom, left:right]), (right - left) / (bottom - top))
    return templates


def _to_template_size(mask: np.ndarray) -> np.ndarray:
    image = Image.fromarray((mask * 255).astype(np.uint8))
    return np.asarray(image.resize((TEMPLATE_PX, TEMPLATE_PX), Image.Resampling.BILINEAR)) > 127
