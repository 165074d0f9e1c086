"""The frozen denoiser with the adapters of all trials on it: how far its predictions are off, and images drawn with it.

Neither touches the training's randomness: an image has its own seed, and stock diffusers draws it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_trainer.config.schema import PromptConfig, SampleConfig
from lora_trainer.data.batches import PromptStore
from lora_trainer.diffusion.batch import Conditioning, tile
from lora_trainer.diffusion.noise_paths import NoisedLatents, NoisePath, squared_error
from lora_trainer.models.adapters.bank import AdapterBank
from lora_trainer.models.family import Family, SampleSettings, View
from lora_trainer.runtime.runtime import Runtime
from lora_trainer.storage import atomic_files
from lora_trainer.training.trial import Trial


@dataclass(frozen=True, slots=True)
class AdaptedDenoiser:
    """What the optimizer step, validation and samples predict with."""

    family: Family
    bank: AdapterBank
    path: NoisePath
    runtime: Runtime

    def squared_errors(self, noised: NoisedLatents, conditioning: Conditioning, num_trials: int) -> torch.Tensor:
        """Mean squared error [P, B] of each image under each of the P trials that act, in fp32."""
        with self.runtime.autocast():
            prediction_MChw = self.family.predict(  # M = P x B, one copy of the batch after the other
                self.bank.denoiser,
                tile(noised.noisy_BChw, num_trials),
                tile(noised.model_times_B, num_trials),
                conditioning.tiled(num_trials),
            )
        errors_M = squared_error(prediction_MChw, tile(noised.target_BChw, num_trials))
        return errors_M.unflatten(0, (num_trials, -1))


class Sampler:
    """Draws the prompts of a config with whatever adapter is active; the VAE waits on the CPU in between.

    Args:
        resolution: width and height, px.
    """

    def __init__(self, denoiser: AdaptedDenoiser, prompts: PromptStore, config: SampleConfig, resolution: int) -> None:
        self.denoiser, self._prompts = denoiser, prompts
        self._config, self._resolution = config, resolution
        self._vae: Any = None

    @torch.no_grad()
    def draw(self, trial: Trial) -> list[Image.Image]:
        """One image per prompt, each with its own seed, with what would be exported of a trial now."""
        if not self._config.prompts:
            return []
        bank, family = self.denoiser.bank, self.denoiser.family
        with self.denoiser.runtime.phase("sample"):
            if self._vae is None:
                self._vae = family.load_vae(torch.device("cpu"))
            vae = self._vae.to(self.denoiser.runtime.device)
            was_training = bank.denoiser.training
            bank.denoiser.eval()
            try:
                with bank.active([trial.adapter]), bank.swapped(trial.adapter, trial.weights()):
                    return [self._draw_one(vae, prompt) for prompt in self._config.prompts]
            finally:
                bank.denoiser.train(was_training)
                vae.to("cpu")

    def _draw_one(self, vae: Any, prompt: PromptConfig) -> Image.Image:
        denoiser, resolution = self.denoiser, self._resolution
        square = View((resolution, resolution), (resolution, resolution), 0, 0, resolution)
        device = denoiser.runtime.device
        views = {key: torch.tensor([v], device=device) for key, v in denoiser.family.view_conditioning(square).items()}
        texts = (prompt.prompt, prompt.negative_prompt)
        cond, uncond = (self._prompts.conditioning([text], views, device).to(denoiser.runtime.dtype) for text in texts)
        num_steps, guidance = self._config.num_inference_steps, self._config.guidance_scale
        settings = SampleSettings(resolution, num_steps, guidance, prompt.seed, denoiser.path.prediction_type)
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
