"""The six classic schedules: golden values, and equality with diffusers at every update."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.optimization import get_scheduler

from lora_trainer.schedules.registry import CLASSIC, SCHEDULES
from lora_trainer.schedules.schedule import Horizon, LRSchedule, ScheduleError, check_duration, to_steps

GOLDEN = {
    "linear": ({"warmup_steps": 2}, [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    "cosine": (
        {"warmup_steps": 2},
        [0, 0.5, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060],
    ),
    "cosine_with_restarts": (
        {"warmup_steps": 2, "num_cycles": 2},
        [0, 0.5, 1, 0.853553, 0.5, 0.146447, 1, 0.853553, 0.5, 0.146447],
    ),
    "constant": ({}, [1] * 10),
    "constant_with_warmup": ({"warmup_steps": 2}, [0, 0.5] + [1] * 8),
}


def laid(name: str, num_steps: int, **options: object) -> LRSchedule:
    return SCHEDULES[name](**options).resolve(Horizon(num_steps, 10))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str) -> None:
    options, expected = GOLDEN[name]
    schedule = laid(name, 10, **options)
    assert [schedule.multiplier(k, 1e-4) for k in range(10)] == pytest.approx(expected, abs=1e-6)


def test_polynomial_golden_values() -> None:
    schedule = laid("polynomial", 3000, warmup_steps=100, power=2, lr_end=1e-7)
    lrs = {k: schedule.lr(k, 5e-5) for k in (1, 50, 100, 1550, 3000)}
    expected = {1: 5e-7, 50: 2.5e-5, 100: 5e-5, 1550: 1.2575e-5, 3000: 1e-7}
    assert lrs == pytest.approx(expected, rel=1e-9)


def test_polynomial_lies_on_linear_with_power_one_and_below_it_with_two() -> None:
    straight = laid("linear", 50, warmup_steps=5)
    one = laid("polynomial", 50, warmup_steps=5, lr_end=0)
    two = laid("polynomial", 50, warmup_steps=5, lr_end=0, power=2)
    assert [one.multiplier(k, 1.0) for k in range(51)] == [straight.multiplier(k, 1.0) for k in range(51)]
    assert all(two.multiplier(k, 1.0) < straight.multiplier(k, 1.0) for k in range(6, 50))


def test_cosine_without_warmup_is_half_a_wave() -> None:
    schedule = laid("cosine", 1000)
    assert [schedule.lr(k, 5e-5) for k in range(1000)] == pytest.approx(
        [5e-5 * 0.5 * (1 + math.cos(math.pi * k / 1000)) for k in range(1000)], abs=1e-18
    )


def test_lr_end_is_the_same_absolute_rate_for_every_base() -> None:
    """torch's LambdaLR would scale it with each group's base LR."""
    schedule = laid("polynomial", 100, lr_end=1e-7)
    assert [schedule.lr(100, base) for base in (1e-4, 5e-5, 1e-3)] == pytest.approx([1e-7] * 3)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("warmup", ["0", "1", "N//10", "N-1"])
@pytest.mark.parametrize("name", CLASSIC)
def test_equals_diffusers_at_every_update(name: str, warmup: str, num_steps: int) -> None:
    num_warmup = eval(warmup, {"N": num_steps})
    if num_warmup >= num_steps:
        pytest.skip("a warm-up as long as the run is refused")
    options: dict[str, object] = {}
    if name != "constant":
        options["warmup_steps"] = num_warmup
    if name == "cosine_with_restarts":
        options["num_cycles"] = 3
    if name == "polynomial":
        options["power"] = 2.0
    ours = laid(name, num_steps, **options)
    for base_lr in (1e-4, 3e-3):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base_lr)
        theirs = get_scheduler(
            name, optimizer, num_warmup_steps=num_warmup, num_training_steps=num_steps, num_cycles=3, power=2.0
        )
        for k in range(num_steps):
            assert abs(ours.lr(k, base_lr) - optimizer.param_groups[0]["lr"]) < 1e-12, (k, base_lr)
            optimizer.step()
            theirs.step()


def test_inclusive_end_reaches_the_floor_at_the_last_update() -> None:
    for name in ("linear", "cosine"):
        schedule = laid(name, 50, end="inclusive", min_ratio=0.1, warmup_steps=5)
        assert schedule.multiplier(49, 1.0) == pytest.approx(0.1, abs=1e-12)


def test_warmup_start_and_shape() -> None:
    assert [laid("linear", 10, warmup_steps=4, warmup_start="one").multiplier(k, 1) for k in range(4)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0]
    )
    assert laid("linear", 10, warmup_steps=4, warmup_start=0.2).multiplier(0, 1) == pytest.approx(0.2)
    assert laid("linear", 10, warmup_steps=4, warmup_shape="cosine").multiplier(2, 1) == pytest.approx(0.5)


def test_cooldown_ends_at_zero_after_the_last_update() -> None:
    schedule = laid("constant", 10, cooldown_steps=4)
    assert [schedule.multiplier(k, 1) for k in range(11)] == pytest.approx([1] * 7 + [0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("warmup", [10, 11, "100%"])
def test_a_warmup_as_long_as_the_run_is_refused(warmup: object) -> None:
    with pytest.raises(ScheduleError, match="does not fit"):
        laid("linear", 10, warmup_steps=warmup)


def test_polynomial_refuses_an_end_above_the_base() -> None:
    with pytest.raises(ScheduleError, match="not below"):
        laid("polynomial", 10, lr_end=1e-3).multiplier(5, 1e-4)


@pytest.mark.parametrize(
    ("written", "updates"),
    [(0, 0), (7, 7), ("2ep", 50), ("0.5ep", 13), ("5%", 2), ("50%", 15), ("0.1%", 1), ("1%", 1), ("0%", 0)],
)
def test_durations(written: object, updates: int) -> None:
    assert to_steps(check_duration(written), Horizon(30, 25)) == updates


@pytest.mark.parametrize("wrong", ["5", "5 percent", "ep", "-5%", "101%", "1.5", -1])
def test_wrong_durations(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"length|percentage"):
        check_duration(wrong)
