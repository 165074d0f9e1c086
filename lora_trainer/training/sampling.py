"""Images from fixed prompts and seeds, drawn by stock diffusers, without touching the training's randomness."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lora_trainer.config.schema import PromptConfig, RunConfig
from lora_trainer.data.batches import PromptStore
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.runtime.runtime import Runtime
from lora_trainer.storage import atomic_files


class Sampler:
    """Draws the prompts of a config with whatever adapter is active; the VAE waits on the CPU in between."""

    def __init__(
        self,
        family: StableDiffusion,
        denoiser: torch.nn.Module,
        prompts: PromptStore,
        config: RunConfig,
        prediction_type: str,
        runtime: Runtime,
    ) -> None:
        self._family, self._denoiser, self._prompts = family, denoiser, prompts
        self._config, self._prediction_type = config.sample, prediction_type
        self._resolution = config.data.resolution
        self._runtime = runtime
        self._vae: AutoencoderKL | None = None

    @torch.no_grad()
    def draw(self) -> list[Image.Image]:
        """One image per prompt, each with its own seed."""
        if self._vae is None:
            self._vae = self._family.load_vae(torch.device("cpu"))
        vae = self._vae.to(self._runtime.device)
        was_training = self._denoiser.training
        self._denoiser.eval()
        try:
            return [self._draw_one(vae, prompt) for prompt in self._config.prompts]
        finally:
            self._denoiser.train(was_training)
            vae.to("cpu")

    def _draw_one(self, vae: AutoencoderKL, prompt: PromptConfig) -> Image.Image:
        pipeline = self._family.pipeline(self._denoiser, vae, self._prediction_type)
        device = self._runtime.device
        said = self._prompts.conditioning([prompt.prompt], device).prompt_embeds_BLD
        unsaid = self._prompts.conditioning([prompt.negative_prompt], device).prompt_embeds_BLD
        with self._runtime.autocast():
            latents = pipeline(
                prompt_embeds=said.to(self._runtime.dtype),
                negative_prompt_embeds=unsaid.to(self._runtime.dtype),
                height=self._resolution,
                width=self._resolution,
                num_inference_steps=self._config.num_inference_steps,
                guidance_scale=self._config.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(prompt.seed),
                output_type="latent",
            ).images
        pixels = vae.decode(latents.float() / vae.config.scaling_factor).sample
        return to_image(pixels[0])


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
