"""Noise, target and error, against diffusers' own noise scheduler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from lora_trainer.config.schema import ObjectiveConfig
from lora_trainer.diffusion.batch import Batch, Conditioning, Slot
from lora_trainer.diffusion.objective import Objective, squared_error

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
    theirs, clean = DDPMScheduler(**SD_NOISE), batch()
    noise_BChw = objective("epsilon").draw(clean, seed=3).target_BChw  # the noise itself
    noised = objective(prediction_type).draw(clean, seed=3)
    noisy = theirs.add_noise(clean.latents_BChw, noise_BChw, noised.timesteps_B)
    torch.testing.assert_close(noised.noisy_BChw, noisy, rtol=1e-6, atol=1e-6)
    velocity = theirs.get_velocity(clean.latents_BChw, noise_BChw, noised.timesteps_B)
    expected = noise_BChw if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(noised.target_BChw, expected, rtol=1e-6, atol=1e-6)


def test_draws_belong_to_the_slot_not_to_the_batch() -> None:
    ours = objective()
    whole = batch(6)
    together = ours.draw(whole, seed=1)
    alone = Batch(whole.latents_BChw[4:5], Conditioning(torch.zeros(1, 4, 8)), torch.ones(1), whole.slots[4:5], ("x",))
    single = ours.draw(alone, seed=1)
    assert torch.equal(single.noisy_BChw[0], together.noisy_BChw[4])
    assert torch.equal(single.target_BChw[0], together.target_BChw[4])
    assert single.timesteps_B[0] == together.timesteps_B[4]


def test_the_digest_tells_draws_apart_and_knows_no_base_nor_target() -> None:
    clean = batch(4)
    first = objective().draw(clean, seed=1).digest
    assert first == objective("v_prediction", gamma=5).draw(clean, seed=1).digest
    assert first != objective().draw(clean, seed=2).digest


def test_timesteps_are_uniform() -> None:
    ours = objective()
    timesteps = torch.tensor([ours._timestep(Slot(0, position), 7) for position in range(20_000)])
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert (counts - 2000).abs().max() < 200


def test_the_error_is_the_mean_square_of_each_sample() -> None:
    stream = torch.Generator().manual_seed(1)
    prediction, target = (torch.randn(3, 4, 8, 8, generator=stream) for _ in range(2))
    expected = torch.nn.functional.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(squared_error(prediction, target), expected)
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        assert squared_error(prediction.to(dtype), target).dtype == kept


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type: str) -> None:
    gamma, clean = 5.0, replace(batch(8), weight_B=torch.linspace(0.5, 2, 8))
    plain, weighted = (objective(prediction_type, each).draw(clean, seed=0) for each in (None, gamma))
    assert torch.equal(plain.weight_B, clean.weight_B)
    alphas = DDPMScheduler(**SD_NOISE).alphas_cumprod[plain.timesteps_B]
    snr = alphas / (1 - alphas)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = clean.weight_B * torch.minimum(snr, torch.full_like(snr, gamma)) / divisor
    torch.testing.assert_close(weighted.weight_B, expected)
    assert torch.equal(weighted.noisy_BChw, plain.noisy_BChw)
