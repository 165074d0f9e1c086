"""Train the demo base's VAE: 64 px pictures to 4 x 16 x 16 latents and back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track

from demo.world.judge import ATTRIBUTES, agreement, read
from demo.world.pictures import stacked, to_pil, to_unit, wider_pictures, world_pictures
from demo.world.world import Scene, all_scenes, draw, is_held_out

BATCH = 16
PEAK_LR = 5e-4
KL_WEIGHT = 2e-5


def new_vae() -> AutoencoderKL:
    """An untrained VAE of about 1.4M parameters with SD's four latent channels."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=64,
    )


def train_vae(num_steps: int, num_pictures: int, folder: Path) -> AutoencoderKL:
    """Train on half world, half wider pictures: L1 on pixels and on their gradients, and a little KL."""
    torch.manual_seed(0)
    vae = new_vae().to(memory_format=torch.channels_last)
    world, _ = world_pictures(num_pictures // 2, seed=1)
    pixels = torch.cat([world, wider_pictures(num_pictures // 2, seed=2)])
    _start_with_little_noise(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, weight_decay=1e-4)
    stream = torch.Generator().manual_seed(3)
    for step in track(range(num_steps), "training the VAE"):
        for group in optimizer.param_groups:
            group["lr"] = one_hump(step, num_steps) * PEAK_LR
        picked = torch.randint(len(pixels), (BATCH,), generator=stream)
        target = to_unit(pixels[picked]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample(generator=stream)).sample
        error = output.float() - target
        likeness = error.square().mean() + error.abs().mean() + _gradients(error)
        loss = likeness + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(
                f"step {step}: loss {loss.item():.4f}, L1 {error.abs().mean().item():.4f}, "
                f"latent std {posterior.mean.std().item():.3f}, noise {posterior.std.mean().item():.3f}",
                flush=True,
            )
        if step % 1000 == 999:
            vae.save_pretrained(folder)
    vae = vae.to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, world[:512]), 5))
    vae.save_pretrained(folder)
    return vae


@torch.no_grad()
def latent_std(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Standard deviation of the latents of uint8 pixels: SD divides by it."""
    return float(torch.cat([vae.encode(to_unit(part)).latent_dist.sample() for part in pixels.split(64)]).std())


@torch.no_grad()
def judge_reconstructions(vae: AutoencoderKL, num: int = 400) -> dict[str, float]:
    """Share of held-out pictures whose words survive encode and decode, by attribute and all at once."""
    rng = np.random.default_rng(11)
    scenes = [scene for scene in all_scenes() if is_held_out(scene)]
    scenes = [scenes[index] for index in rng.integers(0, len(scenes), size=num)]
    pixels = stacked(draw(scene, rng) for scene in scenes)
    decoded = [vae.decode(vae.encode(to_unit(part)).latent_dist.mean).sample for part in pixels.split(64)]
    return shares(scenes, to_pil(torch.cat(decoded)))


def shares(scenes: list[Scene], images: list) -> dict[str, float]:
    """Share of images in which the judge finds each word of the scene, and all of them."""
    found = [agreement(scene, read(image)) for scene, image in zip(scenes, images, strict=True)]
    by_attribute = {name: sum(row[name] for row in found) / len(found) for name in ATTRIBUTES}
    return {**by_attribute, "all": sum(all(row.values()) for row in found) / len(found)}


def one_hump(step: int, num_steps: int) -> float:
    """A 3 % linear warm-up, then half a cosine to 2 %."""
    warm = max(1, num_steps * 3 // 100)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, num_steps - warm)))


@torch.no_grad()
def _start_with_little_noise(vae: AutoencoderKL) -> None:
    """Log variances start at -6: an untrained encoder would otherwise drown its own means."""
    vae.quant_conv.bias[4:] = -6
    vae.quant_conv.weight[4:] *= 0.1


def _gradients(error: torch.Tensor) -> torch.Tensor:
    """L1 of the error's differences between neighbouring pixels: keeps edges sharp."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
