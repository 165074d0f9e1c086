"""Noise, target, times and weights, against diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Batch, Conditioning, Slot
from lora_trainer.diffusion.noise_paths import NoisePath, draw, noise_path, squared_error

SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CPU = torch.device("cpu")


def batch(num: int = 8) -> Batch:
    latents = torch.randn(num, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    slots = tuple(Slot(0, position) for position in range(num))
    return Batch(latents, Conditioning({}), slots, ("x",) * num)


def path(prediction_type: str = "epsilon", gamma: float | None = None, **schedule: object) -> NoisePath:
    return noise_path(SD_NOISE | schedule, prediction_type, {} if gamma is None else {"min_snr_gamma": gamma}, CPU)


def noise_of(num: int, seed: int) -> torch.Tensor:
    return torch.stack([random_streams.normal((4, 8, 8), seed, "noise", 0, position) for position in range(num)])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets_equal_diffusers(prediction_type: str) -> None:
    clean, theirs = batch(), DDPMScheduler(**SD_NOISE)
    latents, noise, ours = clean.latents_BChw, noise_of(8, 3), draw(path(prediction_type), clean, seed=3)
    noisy = theirs.add_noise(latents, noise, ours.model_times_B)
    torch.testing.assert_close(ours.noisy_BChw, noisy, rtol=1e-6, atol=1e-6)
    expected = noise if prediction_type == "epsilon" else theirs.get_velocity(latents, noise, ours.model_times_B)
    torch.testing.assert_close(ours.target_BChw, expected, rtol=1e-6, atol=1e-6)


def test_flow_equals_diffusers() -> None:
    """Where diffusers' scheduler has a step: sigma = t of its training steps."""
    theirs, flow = FlowMatchEulerDiscreteScheduler(), path("flow")
    clean, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    steps = theirs.timesteps[[1, 400, 990]]
    ours = flow.at(clean, noise, steps / 1000)
    torch.testing.assert_close(ours.noisy_BChw, theirs.scale_noise(clean, steps, noise), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.model_times_B, steps)
    stepped = theirs.step(ours.target_BChw[1:2], steps[1], ours.noisy_BChw[1:2], return_dict=False)[0]
    lower = flow.at(clean[1:2], noise[1:2], theirs.timesteps[401:402] / 1000)
    torch.testing.assert_close(stepped, lower.noisy_BChw, rtol=1e-4, atol=1e-4)
    assert ours.weight_B.tolist() == [1, 1, 1]


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_draws_belong_to_the_slot_not_to_the_batch(prediction_type: str) -> None:
    whole, ours = batch(6), path(prediction_type)
    together = draw(ours, whole, seed=1)
    alone = Batch(whole.latents_BChw[4:5], Conditioning({}), whole.slots[4:5], ("x",))
    single = draw(ours, alone, seed=1)
    assert torch.equal(single.noisy_BChw[0], together.noisy_BChw[4])
    assert single.model_times_B[0] == together.model_times_B[4]
    assert single.digest != together.digest
    assert draw(ours, whole, seed=2).digest != together.digest


def test_the_digest_knows_noise_and_times_alone() -> None:
    assert draw(path(), batch(4), seed=1).digest == draw(path("v_prediction", gamma=5), batch(4), seed=1).digest


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_times_are_uniform_and_strata_lie_in_the_middle(prediction_type: str) -> None:
    ours = path(prediction_type)
    drawn = torch.tensor([ours.draw_time(random_streams.stream(7, "timestep", 0, slot)) for slot in range(20_000)])
    share = drawn / 1000 if prediction_type == "epsilon" else drawn
    counts = torch.histc(share, 10, 0, 1)
    assert share.min() >= 0
    assert share.max() < 1
    assert (counts - 2000).abs().max() < 200
    whole = 1000 if prediction_type == "epsilon" else 1
    assert ours.strata(4) == [whole * middle for middle in (0.125, 0.375, 0.625, 0.875)]


def test_the_error_is_the_mean_square_of_each_sample() -> None:
    target, prediction = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    expected = torch.nn.functional.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(squared_error(prediction, target), expected)
    assert squared_error(prediction.bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type: str) -> None:
    ours = draw(path(prediction_type, 5.0), batch(8), seed=0)
    alphas = DDPMScheduler(**SD_NOISE).alphas_cumprod[ours.model_times_B]
    snr = alphas / (1 - alphas)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    torch.testing.assert_close(ours.weight_B, snr.clamp(max=5) / divisor)


@pytest.mark.parametrize(("prediction_type", "limit"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_has_its_limit_where_no_signal_is_left(prediction_type: str, limit: float) -> None:
    ours = path(prediction_type, 5.0, rescale_betas_zero_snr=True)
    end = ours.at(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), torch.tensor([999]))
    assert end.weight_B.item() == pytest.approx(limit, abs=1e-6)
