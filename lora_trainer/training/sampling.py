"""Images from fixed prompts and seeds, drawn by stock diffusers, without touching the training's randomness."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_trainer.config.schema import PromptConfig, SampleConfig
from lora_trainer.data.batches import PromptStore
from lora_trainer.models.family import SampleSettings, View
from lora_trainer.storage import atomic_files
from lora_trainer.training.denoiser import AdaptedDenoiser
from lora_trainer.training.trial import Trial


class Sampler:
    """Draws the prompts of a config with whatever adapter is active; the VAE waits on the CPU in between.

    Args:
        resolution: width and height, px.
    """

    def __init__(self, denoiser: AdaptedDenoiser, prompts: PromptStore, config: SampleConfig, resolution: int) -> None:
        self._denoiser, self._prompts = denoiser, prompts
        self._config, self._resolution = config, resolution
        self._vae: Any = None

    @torch.no_grad()
    def draw(self, trial: Trial) -> list[Image.Image]:
        """One image per prompt, each with its own seed, with what would be exported of a trial now."""
        if not self._config.prompts:
            return []
        bank, family = self._denoiser.bank, self._denoiser.family
        if self._vae is None:
            self._vae = family.load_vae(torch.device("cpu"))
        vae = self._vae.to(self._denoiser.runtime.device)
        was_training = bank.denoiser.training
        bank.denoiser.eval()
        try:
            with bank.active([trial.adapter]), bank.swapped(trial.adapter, trial.weights()):
                return [self._draw_one(vae, prompt) for prompt in self._config.prompts]
        finally:
            bank.denoiser.train(was_training)
            vae.to("cpu")

    def _draw_one(self, vae: Any, prompt: PromptConfig) -> Image.Image:
        denoiser, resolution = self._denoiser, self._resolution
        square = View((resolution, resolution), (resolution, resolution), 0, 0, resolution)
        device = denoiser.runtime.device
        views = {
            name: torch.tensor([v], device=device) for name, v in denoiser.family.view_conditioning(square).items()
        }
        texts = (prompt.prompt, prompt.negative_prompt)
        cond, uncond = (self._prompts.conditioning([text], views, device).to(denoiser.runtime.dtype) for text in texts)
        settings = SampleSettings(
            resolution,
            self._config.num_inference_steps,
            self._config.guidance_scale,
            prompt.seed,
            denoiser.path.prediction_type,
        )
        with denoiser.runtime.autocast():
            latents = denoiser.family.draw_latents(denoiser.bank.denoiser, vae, (cond, uncond), settings)
        return to_image(denoiser.family.decode(vae, latents.float())[0])


def to_image(pixels_CHW: torch.Tensor) -> Image.Image:
    """Pixels in -1..1 as an RGB image."""
    unit = ((pixels_CHW.float() + 1) / 2).clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((unit.cpu().numpy() * 255).round().astype(np.uint8))


def save_samples(folder: Path, step: int, images: Sequence[Image.Image]) -> list[Path]:
    """Write `step-00000100-01.png` ... atomically; the files."""
    files = [folder / f"step-{step:08d}-{index:02d}.png" for index in range(1, len(images) + 1)]
    for file, image in zip(files, images, strict=True):
        atomic_files.write_file(file, png_bytes(image))
    return files


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
