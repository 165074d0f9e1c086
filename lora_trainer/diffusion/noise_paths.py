"""How an image becomes noise: x_t between latents x and noise eps, the denoiser's target, and how each t counts.

Betas: x_t = sqrt(a_t) x + sqrt(1 - a_t) eps with a_t the cumulative product of the noise schedule (Ho et al. 2020); the
target is eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x (Salimans and Ho 2022). Flow matching: x_t = (1 - t) x + t eps,
t in [0, 1), and the target is eps - x (Lipman et al. 2023, Liu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDPMScheduler

from lora_trainer.config.schema import ObjectiveConfig

Weighting = Callable[[torch.Tensor, float, str], torch.Tensor]  # (SNR, the setting's value, prediction type) -> weight


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


class NoisePath(Protocol):
    """A time t per image decides where on the way it is."""

    @property
    def prediction_type(self) -> str: ...

    def draw_time(self, stream: np.random.Generator) -> float:
        """The time of one training sample; times of one kind all are ints or all are floats."""
        ...

    def strata(self, num: int) -> list[float]:
        """The time in the middle of each of so many equal parts of the way."""
        ...

    def at(self, latents_BChw: torch.Tensor, noise_BChw: torch.Tensor, times_B: torch.Tensor) -> NoisedLatents:
        """Latents with this noise at these times."""
        ...


class BetaPath:
    """The noise schedule of a scheduler with betas; times are indices of its T steps."""

    def __init__(
        self, schedule: Mapping[str, Any], prediction_type: str, objective: ObjectiveConfig, device: torch.device
    ) -> None:
        self.prediction_type = prediction_type
        alphas_T = DDPMScheduler.from_config(dict(schedule)).alphas_cumprod
        weight_T = torch.ones_like(alphas_T)
        for key, weighting in WEIGHTINGS.items():
            if (value := getattr(objective, key)) is not None:
                weight_T = weighting(alphas_T / (1 - alphas_T), value, prediction_type)
        self._signal_T, self._noise_T = alphas_T.sqrt().to(device), (1 - alphas_T).sqrt().to(device)
        self._weight_T = weight_T.to(device)

    @property
    def num_timesteps(self) -> int:
        return len(self._signal_T)

    def draw_time(self, stream: np.random.Generator) -> int:
        return int(stream.integers(self.num_timesteps))

    def strata(self, num: int) -> list[float]:
        return [int((stratum + 0.5) * self.num_timesteps / num) for stratum in range(num)]

    def at(self, latents_BChw: torch.Tensor, noise_BChw: torch.Tensor, times_B: torch.Tensor) -> NoisedLatents:
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


def noise_path(
    schedule: Mapping[str, Any], prediction_type: str, objective: ObjectiveConfig, device: torch.device
) -> NoisePath:
    """The path that a base's scheduler, with this configuration, is for."""
    if prediction_type == "flow":
        return FlowPath(schedule)
    return BetaPath(schedule, prediction_type, objective, device)


def _min_snr(snr_T: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """min(SNR, gamma) / SNR, over SNR + 1 for v (Hang et al. 2023); its limit where there is no signal."""
    capped_T = snr_T.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return capped_T / (snr_T + 1)
    return torch.where(snr_T > 0, capped_T / snr_T, 1.0)


WEIGHTINGS: dict[str, Weighting] = {"min_snr_gamma": _min_snr}
"""Loss weightings on betas by their setting in `objective`; null is off."""


def _scale(factor_B: torch.Tensor, values_BChw: torch.Tensor) -> torch.Tensor:
    return factor_B[:, None, None, None] * values_BChw
