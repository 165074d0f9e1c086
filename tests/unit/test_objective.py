"""Noise, target and loss, against diffusers' own noise scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from lora_trainer.config.schema import ObjectiveConfig
from lora_trainer.diffusion.batch import Batch, Conditioning, Slot
from lora_trainer.diffusion.objective import Objective

SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CPU = torch.device("cpu")


def batch(num: int = 8) -> Batch:
    latents = torch.randn(num, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    slots = tuple(Slot(0, position) for position in range(num))
    return Batch(latents, Conditioning(torch.zeros(num, 4, 8)), torch.ones(num), slots, ("x",) * num)


def objective(prediction_type: str = "epsilon", gamma: float | None = None) -> Objective:
    return Objective(ObjectiveConfig(min_snr_gamma=gamma), SD_NOISE, prediction_type, CPU)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets_equal_diffusers(prediction_type: str) -> None:
    ours, theirs, clean = objective(prediction_type), DDPMScheduler(**SD_NOISE), batch()
    draw = ours.draw(clean, seed=3)
    noisy = theirs.add_noise(clean.latents_BChw, draw.noise_BChw, draw.timesteps_B)
    torch.testing.assert_close(ours.noisy(clean.latents_BChw, draw), noisy, rtol=1e-6, atol=1e-6)
    velocity = theirs.get_velocity(clean.latents_BChw, draw.noise_BChw, draw.timesteps_B)
    expected = draw.noise_BChw if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(ours.target(clean.latents_BChw, draw), expected, rtol=1e-6, atol=1e-6)


def test_draws_belong_to_the_slot_not_to_the_batch() -> None:
    ours = objective()
    whole = batch(6)
    together = ours.draw(whole, seed=1)
    alone = Batch(whole.latents_BChw[4:5], Conditioning(torch.zeros(1, 4, 8)), torch.ones(1), whole.slots[4:5], ("x",))
    single = ours.draw(alone, seed=1)
    assert torch.equal(single.noise_BChw[0], together.noise_BChw[4])
    assert single.timesteps_B[0] == together.timesteps_B[4]


def test_timesteps_are_uniform() -> None:
    ours = objective()
    timesteps = torch.tensor([ours._timestep(Slot(0, position), 7) for position in range(20_000)])
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert (counts - 2000).abs().max() < 200


def test_loss_is_the_mean_square_of_each_sample() -> None:
    ours, clean = objective(), batch(3)
    draw = ours.draw(clean, seed=0)
    prediction = torch.randn(3, 4, 8, 8)
    expected = torch.nn.functional.mse_loss(prediction, draw.noise_BChw, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(ours.loss(prediction, clean.latents_BChw, draw), expected)
    assert ours.loss(prediction.bfloat16(), clean.latents_BChw, draw).dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type: str) -> None:
    gamma, clean = 5.0, batch(8)
    plain, weighted = objective(prediction_type), objective(prediction_type, gamma)
    draw = plain.draw(clean, seed=0)
    prediction = torch.zeros(8, 4, 8, 8)
    alphas = DDPMScheduler(**SD_NOISE).alphas_cumprod[draw.timesteps_B]
    snr = alphas / (1 - alphas)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = (
        plain.loss(prediction, clean.latents_BChw, draw) * torch.minimum(snr, torch.full_like(snr, gamma)) / divisor
    )
    torch.testing.assert_close(weighted.loss(prediction, clean.latents_BChw, draw), expected)
