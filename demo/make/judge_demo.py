"""Did the demo LoRA teach the flower, and does the base still know its own world? Read from pixels, before and after.

    python -m demo.make.judge_demo                      # judges runs/demo
    python -m demo.make.judge_demo --run runs/my-demo

Draws the same captions with the same seeds by the base alone and with the LoRA, all through stock diffusers, and writes
`judge.json` and `before-after.png` into the run directory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from PIL import Image, ImageDraw
from rich.progress import track

from demo.world.judge import agreement, read, shows_zinnia
from demo.world.world import BACKGROUNDS, POSITIONS, Scene, all_scenes, caption, is_held_out
from demo.world.zinnia import PETAL_COLOURS, ZinniaScene, zinnia_caption

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "demo" / "base"
NUM_FLOWERS, NUM_OTHERS = 32, 64
GUIDANCE, STEPS, BATCH = 4.0, 25, 16


@dataclass(frozen=True)
class Verdict:
    """Shares of pictures in which the judge finds what the caption says."""

    flowers_before: float
    flowers_after: float
    others_before: float
    others_after: float

    @property
    def others_kept(self) -> float:
        """Share of the base's own skill that is left."""
        return self.others_after / self.others_before

    @property
    def passed(self) -> bool:
        return self.flowers_before <= 0.05 and self.flowers_after >= 0.8 and self.others_kept >= 0.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="run directory")
    options = parser.parse_args()
    verdict, pictures = judge(lora_of(options.run))
    (options.run / "judge.json").write_text(json.dumps({**vars(verdict), "others_kept": verdict.others_kept}, indent=2))
    before_after(pictures).save(options.run / "before-after.png")
    print(
        f"with the trigger, the judge finds the flower in {verdict.flowers_before:.0%} of {NUM_FLOWERS} samples before "
        f"and {verdict.flowers_after:.0%} after;\n"
        f"other captions: {verdict.others_before:.0%} right before, {verdict.others_after:.0%} after "
        f"({verdict.others_kept:.0%} kept)"
    )
    if not verdict.passed:
        raise SystemExit("the LoRA did not learn what it should (after >= 80 %, before <= 5 %, others kept >= 75 %)")


def lora_of(run: Path) -> Path:
    """The LoRA of a run's end; numbered ones and the best lie beside it."""
    return run / f"{run.resolve().name}.safetensors"


def judge(
    lora: Path, num_flowers: int = NUM_FLOWERS, num_others: int = NUM_OTHERS
) -> tuple[Verdict, dict[str, list[Image.Image]]]:
    """Draw with and without the LoRA, and count; the flower pictures `before` and `after`."""
    disable_progress_bar()
    torch.set_num_threads(1)  # as the demo trains: the same pictures on every machine, also on a busy one
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    flowers = [zinnia_caption(scene) for scene in flower_scenes()[:num_flowers]]
    others = other_scenes()[:num_others]
    before = (
        draw(pipeline, flowers, "drawing flowers before"),
        draw(pipeline, captions(others), "drawing others before"),
    )
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    after = draw(pipeline, flowers, "drawing flowers after"), draw(pipeline, captions(others), "drawing others after")
    verdict = Verdict(
        flowers_before=share(shows_zinnia(image) for image in before[0]),
        flowers_after=share(shows_zinnia(image) for image in after[0]),
        others_before=share(all(agreement(s, read(i)).values()) for s, i in zip(others, before[1], strict=True)),
        others_after=share(all(agreement(s, read(i)).values()) for s, i in zip(others, after[1], strict=True)),
    )
    return verdict, {"before": before[0], "after": after[0]}


def flower_scenes() -> list[ZinniaScene]:
    """Flowers in combinations of colour, place and background, of which the training images hold few."""
    rng = np.random.default_rng(41)
    every = [ZinniaScene(c, p, b) for c in PETAL_COLOURS for p in POSITIONS for b in BACKGROUNDS]
    return [every[index] for index in rng.choice(len(every), NUM_FLOWERS, replace=False)]


def other_scenes() -> list[Scene]:
    """Scenes of the base's world that its own training never saw."""
    rng = np.random.default_rng(42)
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    return [held_out[index] for index in rng.choice(len(held_out), NUM_OTHERS, replace=False)]


def captions(scenes: Sequence[Scene]) -> list[str]:
    return [caption(scene) for scene in scenes]


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, prompts: Sequence[str], what: str) -> list[Image.Image]:
    """One picture per prompt, each with the seed of its place."""
    images: list[Image.Image] = []
    for start in track(range(0, len(prompts), BATCH), what):
        part = list(prompts[start : start + BATCH])
        seeds = [torch.Generator().manual_seed(5000 + start + offset) for offset in range(len(part))]
        images += pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds).images
    return images


def share(found: Any) -> float:
    listed = [bool(each) for each in found]
    return sum(listed) / len(listed)


def before_after(pictures: dict[str, list[Image.Image]], columns: int = 8, zoom: int = 2) -> Image.Image:
    """Two rows of flowers before, two after, same captions and seeds."""
    cell, margin = 64 * zoom, 70
    sheet = Image.new("RGB", (margin + columns * cell, 4 * cell + 12), "white")
    pen = ImageDraw.Draw(sheet)
    for block, (name, images) in enumerate(pictures.items()):
        top = block * (2 * cell + 12)
        pen.text((10, top + cell - 6), name, fill="black", font_size=16)
        for index, image in enumerate(images[: 2 * columns]):
            place = (margin + index % columns * cell, top + index // columns * cell)
            sheet.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), place)
    return sheet


if __name__ == "__main__":
    main()
