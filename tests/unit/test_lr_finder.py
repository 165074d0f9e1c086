"""The reading of a learning-rate ramp: constructed curves, pure noise, a quadratic whose stability limit is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.experiments.lr_finder.analysis import (
    Point,
    RampReading,
    analyse,
    debiased_average,
    has_diverged,
    judge,
    lrs_around,
    paired_gain,
    round_down,
    usual_rules,
    valley_index,
)
from lora_trainer.schedules.cycles import Ramp
from lora_trainer.schedules.schedule import Horizon


def ramp_lrs(start: float, end: float, base_lr: float = 1e-4, length: int = 100) -> list[float]:
    """The learning rates that a ramp of so many updates uses."""
    schedule = Ramp(start_ratio=start / base_lr, end_ratio=end / base_lr).resolve(Horizon(length, 10))
    return [schedule.lr(k, base_lr) for k in range(length)]


LRS = ramp_lrs(1e-6, 1.0)
RATIO = 1e6 ** (1 / 99)
FALLBACK = 1e-4


def hill(lr: float, best: float, crossing: float) -> float:
    """Gain in proportion to the LR up to 1 at `best`, then down in proportion to log LR through 0 at `crossing`."""
    if lr <= best:
        return lr / best
    return 1 - math.log(lr / best) / math.log(crossing / best)


def points(gains: list[float], se: float = 0.01) -> list[Point]:
    return [Point(lr, gain, se, 1.0) for lr, gain in zip(LRS, gains, strict=False)]


@pytest.mark.parametrize(("start", "end"), [(1e-6, 1.0), (1e-7, 0.1), (3e-5, 0.9)])
def test_the_ramp_is_geometric(start: float, end: float) -> None:
    np.testing.assert_allclose(ramp_lrs(start, end), np.geomspace(start, end, 100), rtol=1e-12)
    np.testing.assert_allclose(ramp_lrs(start, end, base_lr=3e-3), np.geomspace(start, end, 100), rtol=1e-12)
    *_, last = lrs = ramp_lrs(start, end, base_lr=1.0)
    assert (lrs[0], last) == (start, end)  # to the bit, but for the product with another base LR


@given(best=st.floats(1e-3, 3e-2), factor=st.floats(1.5, 20))
def test_onset_and_crossing_are_where_the_curve_has_them(best: float, factor: float) -> None:
    crossing = min(best * factor, 0.9)
    reading = analyse(points([hill(lr, best, crossing) for lr in LRS]), FALLBACK)
    found = max(hill(lr, best, crossing) for lr in LRS)
    assert reading.verdict == "found"
    assert reading.onset == next(lr for lr in LRS if hill(lr, best, crossing) >= 0.1 * found)
    assert reading.crossing == next(lr for lr in LRS if lr > best and hill(lr, best, crossing) < 0)
    middle = math.sqrt(reading.onset * reading.crossing)
    assert reading.high == reading.crossing / 2
    assert reading.suggestion <= min(middle, reading.high) * (1 + 1e-11)
    assert reading.suggestion * 1.11 > min(middle, reading.high)


def test_a_fall_after_the_divergence_is_not_taken_for_learning() -> None:
    gains = [hill(lr, 1e-3, 1e-2) if lr < 2e-2 else -5.0 if lr < 0.1 else 3.0 for lr in LRS]
    reading = analyse(points(gains), FALLBACK)
    assert reading.best is not None
    assert reading.best.lr == pytest.approx(1e-3, rel=0.15)
    assert reading.crossing == pytest.approx(1e-2, rel=0.16)


def test_numbers_that_are_not_finite_are_a_crossing() -> None:
    gains = [hill(lr, 1e-3, 1.0) if lr < 3e-3 else math.nan for lr in LRS]
    reading = analyse(points(gains), FALLBACK)
    assert reading.crossing == next(lr for lr in LRS if lr >= 3e-3)
    assert has_diverged(points(gains)[: gains.index(next(g for g in gains if math.isnan(g))) + 1])


def test_a_ramp_that_never_crosses_suggests_less_than_its_best() -> None:
    reading = analyse(points([hill(lr, 1e-2, 1e6) for lr in LRS]), FALLBACK)
    assert (reading.verdict, reading.crossing) == ("found", None)
    assert reading.high == reading.best.lr if reading.best else False
    assert reading.suggestion < 1e-2


def test_a_ramp_that_diverges_early_is_too_coarse_to_read() -> None:
    reading = analyse(points([hill(lr, 1e-5, 3e-5) for lr in LRS]), FALLBACK)
    assert (reading.verdict, reading.suggestion) == ("too few points", FALLBACK)
    assert reading.num_points < 30


def noise_that_is_new_at_each_update(rng: np.random.Generator) -> list[Point]:
    return [Point(lr, *paired_gain(rng.normal(1, 0.1, 64), np.ones(64)), 1.0) for lr in LRS]


def drift_without_direction(rng: np.random.Generator) -> list[Point]:
    """Weights on a random walk whose steps grow with the LR; each measurement has a gradient of its own."""
    gradients, weights, seen = rng.normal(size=(64, 20)), np.zeros(20), []
    for lr in LRS:
        weights = weights + lr * rng.normal(size=20)
        seen.append(Point(lr, *paired_gain(gradients @ weights + 0.5 * weights @ weights, np.zeros(64)), 1.0))
    return seen


@pytest.mark.parametrize("null", [noise_that_is_new_at_each_update, drift_without_direction])
def test_noise_has_no_signal(null: object) -> None:
    verdicts = [analyse(null(np.random.default_rng(seed)), FALLBACK) for seed in range(100)]  # type: ignore[operator]
    assert sum(f.verdict == "no signal" and f.suggestion == FALLBACK for f in verdicts) >= 95


def test_exactly_no_effect_has_no_signal() -> None:
    assert analyse(points([0.0] * 100, se=0.0), FALLBACK).verdict == "no signal"


def quadratic_ramp(curvature: float, seed: int) -> RampReading:
    """SGD on the mean of (c/2)(x - a)^2 over 256 values a, one a per update, from x = 10; stable below LR 2 / c."""
    rng = np.random.default_rng(seed)
    centres, x, seen = rng.normal(size=256), 10.0, []
    start = curvature / 2 * (x - centres) ** 2
    for k in range(100):
        x -= LRS[k] * curvature * (x - rng.choice(centres))
        now = curvature / 2 * (x - centres) ** 2
        seen.append(Point(LRS[k], *paired_gain(now / start.mean(), start / start.mean()), 1.0))
        if has_diverged(seen):
            break
    return analyse(seen, FALLBACK)


@pytest.mark.parametrize("curvature", [10.0, 100.0, 1000.0])
def test_the_upper_end_is_within_a_factor_of_two_of_a_quadratics_stability_limit(curvature: float) -> None:
    for seed in range(10):
        reading = quadratic_ramp(curvature, seed)
        limit = 2 / curvature
        assert reading.high is not None
        assert limit / 2 <= reading.high <= limit * 2
        assert reading.suggestion < limit


@given(st.floats(1e-7, 0.99))
def test_rounding_keeps_two_digits_and_never_rises(lr: float) -> None:
    rounded = round_down(lr)
    assert rounded <= lr * (1 + 1e-11)
    assert rounded > lr * 0.9
    assert float(f"{rounded:.1e}") == rounded


def test_usual_rules_on_a_known_curve() -> None:
    rules = usual_rules(points([hill(lr, 1e-3, 1e-2) for lr in LRS]))
    assert rules["probe: minimum / 10"] == pytest.approx(1e-4, rel=RATIO - 1)
    assert rules["probe: steepest"] == pytest.approx(1e-3, rel=2 * (RATIO - 1))


def test_valley_is_the_middle_of_the_longest_fall() -> None:
    assert (
        valley_index([9, 9, 8, 7, 6, 5, 4, 3, 9, 9]) == 3
    )  # the fall has 7 values up to index 7, so from 0: 0 + 2 + 1
    assert valley_index([5, 4, 3, 2, 1, 0, 6, 7]) == 1


def test_average_has_no_bias_at_its_start() -> None:
    assert debiased_average([3.0] * 5) == pytest.approx([3.0] * 5)


START = np.ones((4, 16))
NOISE = np.random.default_rng(0).normal(size=(4, 16))


def short_run(lr: float, gain: float, spread: float = 0.01) -> tuple[float, np.ndarray]:
    return lr, START - gain + spread * NOISE * (1 + lr)


def test_the_short_run_that_gains_most_is_chosen() -> None:
    verdict = judge(dict([short_run(1e-4, 0.1), short_run(3e-4, 0.2), short_run(1e-3, 0.3), (1e-2, None)]), START)
    assert verdict.choice == 1e-3
    assert verdict.readings[0].behind == pytest.approx(0.2, rel=0.01)
    assert verdict.readings[3].gain is None


def test_of_two_short_runs_that_overlap_the_smaller_is_chosen() -> None:
    other = np.random.default_rng(1).normal(size=(4, 16))
    runs = [short_run(1e-4, 0.1), short_run(3e-4, 0.2), (1e-3, START - 0.201 + 0.05 * other)]
    verdict = judge(dict(runs), START)
    assert verdict.choice == 3e-4
    assert verdict.reason == "3.0e-04 and 1.0e-03 cannot be told apart: the smaller one"


def test_of_two_short_runs_that_rounding_tells_apart_the_smaller_is_named_first() -> None:
    plain = START - 0.2 + 0.01 * NOISE
    for rounding in (-1e-12, 1e-12):
        verdict = judge({1e-4: plain + rounding * NOISE, 3e-4: plain}, START)
        assert verdict.choice == 1e-4
        assert verdict.reason.startswith("1.0e-04 and 3.0e-04 cannot be told apart")


def test_short_runs_without_gain_choose_nothing() -> None:
    assert judge(dict([short_run(1e-4, 0.0001), short_run(1e-3, -0.1)]), START).choice is None
    assert judge({1e-4: None}, START).choice is None


def test_short_runs_are_five_half_a_decade_apart() -> None:
    assert lrs_around(2e-3, 1.0) == [2e-4, 6.3e-4, 2e-3, 6.3e-3, 2e-2]
    assert lrs_around(0.5, 1.0)[-1] == 1.0
