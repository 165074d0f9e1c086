"""Too large, too small, just right: on a parabola of known curvature, where each can be calculated."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import TypeAdapter

from lora_trainer.config.optimizers import AnyOptimizerOptions
from lora_trainer.schedules.registry import SCHEDULES
from lora_trainer.schedules.schedule import Horizon
from lora_trainer.training.optimizers import build_optimizer

pytestmark = pytest.mark.quick

CURVATURE = 4.0  # of the loss c x^2 / 2, so plain SGD multiplies x by 1 - lr c at each update
NUM_UPDATES = 40


def path(lr: float, schedule: str = "constant", noise: float = 0.0) -> list[float]:
    """x after each update, from x = 1; `noise` is the size of an alternating error of the gradient."""
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    options = TypeAdapter(AnyOptimizerOptions).validate_python({"type": "sgd", "lr": lr, "momentum": 0})
    horizon = Horizon(NUM_UPDATES, 10)
    optimizer, laid = build_optimizer(options, [[weight]], horizon), SCHEDULES[schedule]().resolve(horizon)
    points = []
    for k in range(NUM_UPDATES):
        weight.grad = CURVATURE * weight.detach() + noise * (-1) ** k
        optimizer.param_groups[0]["lr"] = laid.lr(k, lr)
        optimizer.step()
        points.append(weight.item())
    return points


def test_above_two_over_the_curvature_it_diverges() -> None:
    points = path(2.2 / CURVATURE)
    assert all(abs(second) > abs(first) for first, second in itertools.pairwise(points))
    assert points[-1] == pytest.approx(1.2**NUM_UPDATES)


def test_between_one_and_two_it_swings_and_settles() -> None:
    points = path(1.5 / CURVATURE)
    assert all(first * second < 0 for first, second in itertools.pairwise(points))
    assert abs(points[-1]) == pytest.approx(0.5**NUM_UPDATES)


def test_below_one_it_falls_without_a_swing_and_ten_times_smaller_takes_ten_times_as_long() -> None:
    points, slow = path(0.2 / CURVATURE), path(0.02 / CURVATURE)
    assert all(0 < second < first for first, second in itertools.pairwise(points))
    halved, halved_slowly = (next(k for k, x in enumerate(xs) if x < 0.5) for xs in (points, slow))
    assert (halved + 1) * 10 == pytest.approx(halved_slowly + 1, rel=0.2)


def test_with_noise_a_fixed_rate_never_settles_and_a_decay_does() -> None:
    """Why a constant LR stays above the minimum: what is left is as large as the LR lets the noise move x."""
    fixed, decayed = path(0.5 / CURVATURE, noise=1.0), path(0.5 / CURVATURE, "linear", noise=1.0)
    assert abs(fixed[-1]) > 0.05
    assert abs(decayed[-1]) < abs(fixed[-1]) / 5
