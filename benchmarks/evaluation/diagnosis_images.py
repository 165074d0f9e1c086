"""Images with captions for the runs that judge the diagnosis: flowers, shapes of the base's own world, plain grays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from demo.world.world import BACKGROUNDS, IMAGE_PX, POSITIONS, all_scenes, caption, draw
from demo.world.zinnia import PETAL_COLOURS, ZinniaScene, draw_zinnia, zinnia_caption


def zinnias(folder: Path, num: int, rng: np.random.Generator, say: Callable[[str], str] = str) -> None:
    """Flowers that the base has never seen; `say` turns a caption into what is written."""
    known = [ZinniaScene(c, p, b) for c in PETAL_COLOURS for p in POSITIONS for b in BACKGROUNDS]
    for index, chosen in enumerate(rng.choice(len(known), num, replace=False)):
        _write(folder, index, draw_zinnia(known[chosen], rng), say(zinnia_caption(known[chosen])))


def shapes(folder: Path, num: int, rng: np.random.Generator, shape: str | None = None) -> None:
    """Pictures of the base's own world, of one shape or of all."""
    known = [scene for scene in all_scenes() if shape in (None, scene.shape)]
    for index, chosen in enumerate(rng.choice(len(known), num, replace=False)):
        _write(folder, index, draw(known[chosen], rng), caption(known[chosen]))


def grays(folder: Path, num: int, rng: np.random.Generator, middle: int) -> None:
    """Plain pictures of nearly one colour: a single direction to learn, and an end to what can be learned."""
    for index in range(num):
        colour = tuple(int(value) for value in middle + rng.integers(-8, 8, 3))
        _write(folder, index, Image.new("RGB", (IMAGE_PX, IMAGE_PX), colour), "a plain gray background")


def _write(folder: Path, index: int, picture: Image.Image, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{index:02d}.png")
    (folder / f"{index:02d}.txt").write_text(text + "\n")
