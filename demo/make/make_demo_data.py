"""Draw the demo's training images: two dozen zinnias with captions, a flower that the demo base has never seen.

python -m demo.make.make_demo_data     # writes demo/images/*.png and *.txt, the same bytes every time
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from demo.world.world import BACKGROUNDS, POSITIONS
from demo.world.zinnia import PETAL_COLOURS, ZinniaScene, draw_zinnia, zinnia_caption

FOLDER = Path(__file__).resolve().parents[2] / "demo" / "images"
NUM_IMAGES = 24


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(demo_scenes()):
        name = f"{index:02d}-{scene.colour}-{scene.background}"
        draw_zinnia(scene, np.random.default_rng([7, index])).save(FOLDER / f"{name}.png", optimize=True)
        (FOLDER / f"{name}.txt").write_text(zinnia_caption(scene) + "\n")
    print(f"wrote {NUM_IMAGES} images with captions to {FOLDER}")


def demo_scenes() -> list[ZinniaScene]:
    """Every petal colour once on every background; places in turn."""
    places, backgrounds = list(POSITIONS), list(BACKGROUNDS)
    return [
        ZinniaScene(
            colour=PETAL_COLOURS[index % len(PETAL_COLOURS)],
            position=places[(index + index // len(PETAL_COLOURS) + 1) % len(places)],
            background=backgrounds[(index + index // 12) % len(backgrounds)],
        )
        for index in range(NUM_IMAGES)
    ]


if __name__ == "__main__":
    main()
