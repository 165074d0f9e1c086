"""Diffusion training as plain arithmetic: noise, target, per-sample loss.

x_t = sqrt(a_t) x + sqrt(1 - a_t) eps with a_t the cumulative product of the noise schedule (Ho et al. 2020); the target
is eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x (Salimans and Ho 2022). The loss weight min(SNR, gamma) / SNR (over
SNR + 1 for v) is that of Hang et al. 2023.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler

from lora_trainer.config.schema import ObjectiveConfig
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Batch, Slot

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, slots=True)
class NoisedLatents:
    """What the denoiser sees and should say of B images, on the device."""

    noisy_BChw: torch.Tensor
    target_BChw: torch.Tensor
    timesteps_B: torch.Tensor
    weight_B: torch.Tensor
    """Of each image in the loss."""
    digest: str = ""
    """Hash of noise and timesteps: equal for runs that drew the same."""


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

    def draw(self, batch: Batch, seed: int) -> NoisedLatents:
        """The batch's latents with noise and timesteps of their own, each sample's by its slot."""
        shape, device = batch.latents_BChw.shape[1:], batch.latents_BChw.device
        noise = torch.stack([random_streams.normal(shape, seed, "noise", *slot) for slot in batch.slots])
        timesteps = torch.tensor([self._timestep(slot, seed) for slot in batch.slots])
        digest = hashlib.blake2b(timesteps.numpy().tobytes() + noise.numpy().tobytes(), digest_size=8).hexdigest()
        noised = self.noised(
            batch.latents_BChw, noise.to(device, non_blocking=True), timesteps.to(device, non_blocking=True)
        )
        return replace(noised, weight_B=noised.weight_B * batch.weight_B, digest=digest)

    def noised(self, latents_BChw: torch.Tensor, noise_BChw: torch.Tensor, timesteps_B: torch.Tensor) -> NoisedLatents:
        """Latents with this noise at these timesteps, what is to be predicted, and the loss weight."""
        signal, strength = self._signal_T[timesteps_B], self._noise_T[timesteps_B]
        noisy_BChw = _scale(signal, latents_BChw) + _scale(strength, noise_BChw)
        target_BChw = noise_BChw
        if self.prediction_type == "v_prediction":
            target_BChw = _scale(signal, noise_BChw) - _scale(strength, latents_BChw)
        return NoisedLatents(noisy_BChw, target_BChw, timesteps_B, self._weight_T[timesteps_B])

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
