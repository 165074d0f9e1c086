"""Noise and times of a batch by counter, and the error of a prediction."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Batch
from lora_trainer.diffusion.noise_paths import NoisedLatents, NoisePath


def draw(path: NoisePath, batch: Batch, seed: int) -> NoisedLatents:
    """The batch's latents with noise and a time of their own, each sample's by its slot."""
    shape, device = batch.latents_BChw.shape[1:], batch.latents_BChw.device
    noise = torch.stack([random_streams.normal(shape, seed, "noise", *slot) for slot in batch.slots])
    times = torch.tensor([path.draw_time(random_streams.stream(seed, "timestep", *slot)) for slot in batch.slots])
    digest = hashlib.blake2b(times.numpy().tobytes() + noise.numpy().tobytes(), digest_size=8).hexdigest()
    noised = path.at(batch.latents_BChw, noise.to(device, non_blocking=True), times.to(device, non_blocking=True))
    return replace(noised, weight_B=noised.weight_B * batch.weight_B, digest=digest)


def squared_error(prediction_BChw: torch.Tensor, target_BChw: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample [B], in fp32, or fp64 where the prediction is."""
    exact = torch.promote_types(prediction_BChw.dtype, torch.float32)
    return (prediction_BChw.to(exact) - target_BChw).square().flatten(1).mean(1)
