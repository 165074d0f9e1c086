"""Diffusion training as plain arithmetic: noise, target, per-sample loss.

x_t = sqrt(a_t) x + sqrt(1 - a_t) eps with a_t the cumulative product of the noise schedule (Ho et al. 2020); the target
is eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x (Salimans and Ho 2022). The loss weight min(SNR, gamma) / SNR (over
SNR + 1 for v) is that of Hang et al. 2023.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler

from lora_trainer.config.schema import ObjectiveConfig
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Batch, Draw, Slot

PredictionType = Literal["epsilon", "v_prediction"]


class Objective:
    """Draws noise and timesteps by counter, and turns a prediction into one loss per sample."""

    def __init__(
        self,
        config: ObjectiveConfig,
        noise_schedule: dict[str, Any],
        prediction_type: PredictionType,
        device: torch.device,
    ) -> None:
        self.prediction_type = prediction_type
        alphas = DDPMScheduler.from_config(noise_schedule).alphas_cumprod
        self.num_timesteps = len(alphas)
        self._signal_T = alphas.sqrt().to(device)
        self._noise_T = (1 - alphas).sqrt().to(device)
        self._weight_T = _snr_weights(alphas, config.min_snr_gamma, prediction_type).to(device)

    def draw(self, batch: Batch, seed: int) -> Draw:
        """Noise [B, C, h, w] and timesteps [B], each sample's own by its slot."""
        shape = batch.latents_BChw.shape[1:]
        device = batch.latents_BChw.device
        noise = torch.stack([random_streams.normal(shape, seed, "noise", *slot) for slot in batch.slots])
        timesteps = torch.tensor([self._timestep(slot, seed) for slot in batch.slots])
        digest = hashlib.blake2b(timesteps.numpy().tobytes() + noise.numpy().tobytes(), digest_size=8).hexdigest()
        return Draw(noise.to(device, non_blocking=True), timesteps.to(device, non_blocking=True), digest)

    def noisy(self, latents_BChw: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Noisy latents [B, C, h, w] at the drawn timesteps."""
        signal, noise = self._signal_T[draw.timesteps_B], self._noise_T[draw.timesteps_B]
        return _scale(signal, latents_BChw) + _scale(noise, draw.noise_BChw)

    def target(self, latents_BChw: torch.Tensor, draw: Draw) -> torch.Tensor:
        """What the denoiser should predict [B, C, h, w]."""
        if self.prediction_type == "epsilon":
            return draw.noise_BChw
        signal, noise = self._signal_T[draw.timesteps_B], self._noise_T[draw.timesteps_B]
        return _scale(signal, draw.noise_BChw) - _scale(noise, latents_BChw)

    def loss(self, prediction_BChw: torch.Tensor, latents_BChw: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Weighted mean squared error of each sample [B], in fp32."""
        error_B = squared_error(prediction_BChw, self.target(latents_BChw, draw))
        return error_B * self._weight_T[draw.timesteps_B]

    def _timestep(self, slot: Slot, seed: int) -> int:
        return int(random_streams.stream(seed, "timestep", *slot).integers(self.num_timesteps))


def squared_error(prediction_BChw: torch.Tensor, target_BChw: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample [B], in fp32, or fp64 where the prediction is."""
    exact = torch.promote_types(prediction_BChw.dtype, torch.float32)
    return (prediction_BChw.to(exact) - target_BChw).square().flatten(1).mean(1)


def _snr_weights(alphas_T: torch.Tensor, gamma: float | None, prediction_type: PredictionType) -> torch.Tensor:
    if gamma is None:
        return torch.ones_like(alphas_T)
    snr_T = alphas_T / (1 - alphas_T)
    capped = snr_T.clamp(max=gamma)
    return capped / snr_T if prediction_type == "epsilon" else capped / (snr_T + 1)


def _scale(factor_B: torch.Tensor, values_BChw: torch.Tensor) -> torch.Tensor:
    return factor_B[:, None, None, None] * values_BChw
