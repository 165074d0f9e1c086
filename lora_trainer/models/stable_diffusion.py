"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet with cross-attention, a four-channel VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from lora_trainer.diffusion.batch import Conditioning
from lora_trainer.errors import ModelError, Problem
from lora_trainer.models.folder import BaseFolder

disable_progress_bar()
_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
}


class StableDiffusion:
    """Loads, encodes and predicts; holds no component longer than its caller does."""

    name = "sd"
    kohya_prefixes: ClassVar[dict[str, str]] = {"unet": "lora_unet"}

    def __init__(self, base: BaseFolder) -> None:
        self.base = base

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.base.component_config("vae")["block_out_channels"]) - 1)

    @property
    def noise_schedule(self) -> dict[str, Any]:
        """The base's noise scheduler configuration."""
        return self.base.component_config("scheduler")

    @property
    def kohya_version(self) -> str:
        """`ss_base_model_version`: SD 2.x is told by its wider text encoder."""
        if self.base.component_config("unet")["cross_attention_dim"] != 1024:
            return "sd_v1"
        return "sd_v2_v" if self.noise_schedule.get("prediction_type") == "v_prediction" else "sd_v2"

    @property
    def architecture(self) -> str:
        """`modelspec.architecture` of a LoRA for this base."""
        return f"{_ARCHITECTURES[self.kohya_version]}/lora"

    def load_tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.base.path / "tokenizer")

    def load_text_encoder(self, device: torch.device) -> CLIPTextModel:
        """The frozen text encoder in fp32, whatever its stored dtype."""
        return self._load(CLIPTextModel, "text_encoder", device, torch.float32)

    def load_vae(self, device: torch.device) -> AutoencoderKL:
        """The frozen VAE in fp32: SD's overflows in fp16 on some images."""
        return self._load(AutoencoderKL, "vae", device, torch.float32)

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
        """The frozen UNet in the dtype of the forward pass."""
        return self._load(UNet2DConditionModel, "unet", device, dtype)

    @torch.no_grad()
    def encode_images(self, vae: AutoencoderKL, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [B, C, h, w] of the scaled latents of pixels in -1..1."""
        posterior = vae.encode(pixels_BCHW).latent_dist
        factor = vae.config.scaling_factor
        return posterior.mean * factor, posterior.std * factor

    @torch.no_grad()
    def encode_prompts(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]
    ) -> torch.Tensor:
        """Prompt embeddings [B, L, D], padded and cut to the encoder's length as the SD pipeline does."""
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = None
        if getattr(text_encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(text_encoder.device)
        return text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=mask)[0]

    def count_tokens(self, tokenizer: CLIPTokenizer, prompt: str) -> int:
        """Tokens of a prompt with its two ends, before any cut."""
        return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def predict(
        self,
        denoiser: UNet2DConditionModel,
        noisy_BChw: torch.Tensor,
        timesteps_B: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """The denoiser's output [B, C, h, w]."""
        return denoiser(noisy_BChw, timesteps_B, conditioning.prompt_embeds_BLD, return_dict=False)[0]

    def pipeline(
        self, denoiser: UNet2DConditionModel, vae: AutoencoderKL, prediction_type: str
    ) -> StableDiffusionPipeline:
        """Stock diffusers pipeline (DDIM) over loaded parts, for prompt embeddings rather than texts."""
        scheduler = DDIMScheduler.from_config(self.noise_schedule, prediction_type=prediction_type)
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=denoiser,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load(self, model: Any, component: str, device: torch.device, dtype: torch.dtype) -> Any:
        """A component's frozen model.

        Raises:
            ModelError: a weight is not finite.
        """
        variant = self.base.variant(component)
        loaded = model.from_pretrained(
            self.base.path / component, dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant
        )
        for name, parameter in loaded.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ModelError(
                    Problem(
                        f"the {component}'s weight `{name}` holds NaN or infinite values", fix="fetch the base again"
                    )
                )
        return loaded.requires_grad_(False).eval().to(device)
