"""The frozen denoiser with the adapters of all trials on it, and how its predictions compare with their targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_trainer.diffusion.batch import Conditioning, tile
from lora_trainer.diffusion.noise_paths import NoisedLatents, NoisePath, squared_error
from lora_trainer.models.adapters.bank import AdapterBank
from lora_trainer.models.family import Family
from lora_trainer.runtime.runtime import Runtime


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
