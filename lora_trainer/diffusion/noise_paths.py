"""The objective: x_t between latents x and noise eps, the denoiser's target, how each t counts, and the error.

Betas: x_t = sqrt(a_t) x + sqrt(1 - a_t) eps with a_t the cumulative product of the noise schedule (Ho et al. 2020); the
target is eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x (Salimans and Ho 2022). Flow matching: x_t = (1 - t) x + t eps,
t in [0, 1), and the target is eps - x (Lipman et al. 2023, Liu et al. 2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler

from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Batch

Weighting = Callable[[torch.Tensor, float, str], torch.Tensor]
"""Weight of each t from (SNR [T], the setting's value, prediction type)."""


@dataclass(frozen=True, slots=True)
class NoisedLatents:
    """What the denoiser sees and should say of B images, on the device."""

    noisy_BChw: torch.Tensor
    target_BChw: torch.Tensor
    model_times_B: torch.Tensor
    """What the denoiser is told of the time."""
    weight_B: torch.Tensor
    """Of each image in the loss."""
    digest: str = ""
    """Hash of noise and times: equal for runs that drew the same."""


class BetaPath:
    """The noise schedule of a scheduler with betas; times are indices of its T steps."""

    def __init__(
        self, schedule: Mapping[str, Any], prediction_type: str, weightings: Mapping[str, float], device: torch.device
    ) -> None:
        self.prediction_type = prediction_type
        alphas_T = DDPMScheduler.from_config(dict(schedule)).alphas_cumprod
        self._num_timesteps = len(alphas_T)
        weight_T = torch.ones_like(alphas_T)
        for name, value in weightings.items():
            weight_T = weight_T * WEIGHTINGS[name](alphas_T / (1 - alphas_T), value, prediction_type)
        self._signal_T, self._noise_T = alphas_T.sqrt().to(device), (1 - alphas_T).sqrt().to(device)
        self._weight_T = weight_T.to(device)

    def draw_time(self, stream: np.random.Generator) -> int:
        """The time of one training sample."""
        return int(stream.integers(self._num_timesteps))

    def strata(self, num: int) -> list[int]:
        """The times in the middle of `num` equal parts of the way."""
        return [int((stratum + 0.5) * self._num_timesteps / num) for stratum in range(num)]

    def at(self, latents_BChw: torch.Tensor, noise_BChw: torch.Tensor, times_B: torch.Tensor) -> NoisedLatents:
        """Latents with this noise at these times."""
        signal_B, strength_B = self._signal_T[times_B], self._noise_T[times_B]
        noisy_BChw = _scale(signal_B, latents_BChw) + _scale(strength_B, noise_BChw)
        target_BChw = noise_BChw
        if self.prediction_type == "v_prediction":
            target_BChw = _scale(signal_B, noise_BChw) - _scale(strength_B, latents_BChw)
        return NoisedLatents(noisy_BChw, target_BChw, times_B, self._weight_T[times_B])


class FlowPath:
    """The straight way of flow matching; times are drawn evenly from [0, 1), and the model is told t x 1000."""

    prediction_type = "flow"

    def __init__(self, schedule: Mapping[str, Any]) -> None:
        self._model_scale = float(schedule.get("num_train_timesteps", 1000))

    def draw_time(self, stream: np.random.Generator) -> float:
        return float(stream.random())

    def strata(self, num: int) -> list[float]:
        return [(stratum + 0.5) / num for stratum in range(num)]

    def at(self, latents_BChw: torch.Tensor, noise_BChw: torch.Tensor, times_B: torch.Tensor) -> NoisedLatents:
        noisy_BChw = _scale(1 - times_B, latents_BChw) + _scale(times_B, noise_BChw)
        weight_B = torch.ones_like(times_B)
        return NoisedLatents(noisy_BChw, noise_BChw - latents_BChw, times_B * self._model_scale, weight_B)


NoisePath = BetaPath | FlowPath
"""A time t per image decides where on the way it is."""


def noise_path(
    schedule: Mapping[str, Any], prediction_type: str, weightings: Mapping[str, float], device: torch.device
) -> NoisePath:
    """The path that a base's scheduler, with this configuration, is for.

    Args:
        weightings: those that are on, by their setting in `objective`.
    """
    if prediction_type == "flow":
        return FlowPath(schedule)
    return BetaPath(schedule, prediction_type, weightings, device)


def draw(path: NoisePath, batch: Batch, seed: int) -> NoisedLatents:
    """The batch's latents with noise and a time of their own, each sample's by its slot."""
    shape, device = batch.latents_BChw.shape[1:], batch.latents_BChw.device
    noise_BChw = torch.stack([random_streams.normal(shape, seed, "noise", *slot) for slot in batch.slots])
    times_B = torch.tensor([path.draw_time(random_streams.stream(seed, "timestep", *slot)) for slot in batch.slots])
    digest = hashlib.blake2b(times_B.numpy().tobytes() + noise_BChw.numpy().tobytes(), digest_size=8).hexdigest()
    noise_BChw, times_B = noise_BChw.to(device, non_blocking=True), times_B.to(device, non_blocking=True)
    return replace(path.at(batch.latents_BChw, noise_BChw, times_B), digest=digest)


def squared_error(prediction_BChw: torch.Tensor, target_BChw: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample [B], in fp32, or fp64 where the prediction is."""
    exact = torch.promote_types(prediction_BChw.dtype, torch.float32)
    return (prediction_BChw.to(exact) - target_BChw).square().flatten(1).mean(1)


def _min_snr(snr_T: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """min(SNR, gamma) / SNR, over SNR + 1 for v (Hang et al. 2023); its limit where there is no signal."""
    capped_T = snr_T.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return capped_T / (snr_T + 1)
    return torch.where(snr_T > 0, capped_T / snr_T, 1.0)


WEIGHTINGS: dict[str, Weighting] = {"min_snr_gamma": _min_snr}
"""Loss weightings on betas, each under the name of its setting in `objective`."""


def _scale(factor_B: torch.Tensor, values_BChw: torch.Tensor) -> torch.Tensor:
    return factor_B[:, None, None, None] * values_BChw
