"""Train the demo base's UNet and text encoder together, on cached latents of the drawn world."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from rich.progress import track
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.world.autoencoder import one_hump
from demo.world.captions import MAX_TOKENS, training_caption
from demo.world.pictures import to_unit, world_pictures

BATCH = 32
PEAK_LR = 8e-4
TEXT_WIDTH = 128
EMA_DECAY = 0.999
NOISY_FROM = 750


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, sampled with DDIM."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model of three layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet of about 3M parameters on 16 x 16 latents, with cross-attention at 8 x 8 and 4 x 4.

    The 4 x 4 level is what learns positions: there every cell lies beside a border, and zero padding tells it where.
    """
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(40, 80, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


class DenoiserTraining:
    """UNet and text encoder with their average, optimizer and step; saved and resumed as one file."""

    def __init__(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, num_pictures: int, file: Path) -> None:
        torch.manual_seed(20)
        self.tokenizer, self.file, self.step = tokenizer, file, 0
        self.models = torch.nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
        self.average = copy.deepcopy(self.models).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.models.parameters(), lr=PEAK_LR, weight_decay=1e-2)
        pixels, self.scenes = world_pictures(num_pictures, seed=21)
        self.latents = encode(vae, pixels)
        self.alphas = noise_scheduler().alphas_cumprod
        if file.is_file():
            self._load()

    def train(self, num_steps: int) -> None:
        """Run up to `num_steps`: epsilon loss weighted by 1 / alpha_bar, half of it on the noisiest timesteps.

        The place of things is decided where there is hardly anything to see yet. Plain epsilon loss barely counts
        those timesteps, and a base trained on uniform ones ignored the words for positions for thousands of steps;
        on the noisiest alone it learnt them within two hundred.
        """
        for step in track(range(self.step, num_steps), "training the denoiser"):
            for group in self.optimizer.param_groups:
                group["lr"] = one_hump(step, num_steps) * PEAK_LR
            loss = self._loss(np.random.default_rng([22, step]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.models.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._follow(step)
            self.step = step + 1
            if self.step % 200 == 0:
                print(f"step {self.step}: loss {loss.item():.4f}", flush=True)
            if self.step % 1000 == 0 or self.step == num_steps:
                self._save()

    def _loss(self, rng: np.random.Generator) -> torch.Tensor:
        picked = rng.integers(0, len(self.latents), size=BATCH)
        captions = [training_caption(self.scenes[index], rng) for index in picked]
        tokens = self.tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        latents = self.latents[picked]
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        timesteps = torch.from_numpy(rng.integers(np.where(np.arange(BATCH) % 2, 0, NOISY_FROM), len(self.alphas)))
        alpha = self.alphas[timesteps, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted = self.models["unet"](noisy, timesteps, self.models["text_encoder"](tokens)[0]).sample
        return ((predicted - noise).square() / alpha).mean()

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        averages: list[torch.Tensor] = list(self.average.parameters())
        weights: list[torch.Tensor] = list(self.models.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def _save(self) -> None:
        state: dict[str, Any] = {
            "models": self.models.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        aside = self.file.with_suffix(".tmp")
        torch.save(state, aside)
        aside.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.models.load_state_dict(state["models"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        print(f"resuming the denoiser at step {self.step}")


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Scaled latents [num, 4, 16, 16] of uint8 pixels."""
    parts = track(pixels.split(64), "encoding the world")
    return torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in parts]) * vae.config.scaling_factor
