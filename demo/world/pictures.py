"""Seeded piles of drawn pictures, as uint8 tensors: what the autoencoder and the denoiser train on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from demo.world.wider import draw_wider
from demo.world.world import Scene, all_scenes, draw, is_held_out


def world_pictures(num: int, seed: int) -> tuple[torch.Tensor, list[Scene]]:
    """`num` pictures [num, 3, 64, 64] (uint8) of scenes that are not held out, with their scenes."""
    scenes = [scene for scene in all_scenes() if not is_held_out(scene)]
    rng = np.random.default_rng(seed)
    chosen = [scenes[index] for index in rng.integers(0, len(scenes), size=num)]
    return stacked(draw(scene, rng) for scene in track(chosen, "drawing the world")), chosen


def wider_pictures(num: int, seed: int) -> torch.Tensor:
    """`num` pictures [num, 3, 64, 64] (uint8) that are wider than the world."""
    rng = np.random.default_rng(seed)
    return stacked(draw_wider(rng) for _ in track(range(num), "drawing wider pictures"))


def stacked(images: Iterable[Image.Image]) -> torch.Tensor:
    """PIL RGB images as one uint8 tensor [num, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels [num, 3, H, W] in -1..1 as PIL RGB images."""
    bytes_ = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in bytes_.permute(0, 2, 3, 1).numpy()]


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as floats in -1..1."""
    return pixels.float() / 127.5 - 1
