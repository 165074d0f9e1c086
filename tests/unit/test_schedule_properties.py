"""What holds for every schedule with any options: bounds, floors, clamping, direction, continuity, units."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_trainer.schedules.registry import SCHEDULES
from lora_trainer.schedules.schedule import Horizon, LRSchedule, ScheduleError, to_steps

BASE_LR = 1e-3
ROUNDING = 1e-12
ratio = st.floats(0, 1)
factor = st.floats(0.01, 1)
percent = st.integers(1, 99).map(lambda share: f"{share}%")
length = st.one_of(st.integers(1, 60), percent, st.integers(1, 4).map(lambda epochs: f"{epochs}ep"))

OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {"min_ratio": ratio},
    "cosine": {"min_ratio": ratio, "num_cycles": st.floats(0.05, 3)},
    "cosine_with_restarts": {"min_ratio": ratio, "num_cycles": st.integers(1, 6)},
    "polynomial": {"power": st.floats(0.2, 5), "lr_end": st.floats(0, 0.9 * BASE_LR)},
    "cosine_annealing": {"t_max": length, "eta_min": st.floats(0, BASE_LR)},
    "cosine_warm_restarts": {"t_0": length, "t_mult": st.integers(1, 3), "decay": factor},
    "exponential": {"unit": st.sampled_from(["step", "epoch"]), "final_ratio": factor},
    "step": {"step_size": length, "gamma": factor},
    "multistep": {"milestones": st.sampled_from([["30%"], ["20%", "60%"], ["25%", "50%", "75%"]]), "gamma": factor},
    "piecewise_constant": {"boundaries": st.just(["30%", "70%"]), "values": st.tuples(ratio, ratio, ratio)},
    "inverse_sqrt": {"timescale": length},
    "warmup_stable_decay": {
        "decay_steps": length,
        "decay_shape": st.sampled_from(["linear", "cosine", "1-sqrt"]),
        "min_ratio": ratio,
    },
    "rex": {"d": st.floats(0, 0.99), "min_ratio": ratio},
    "one_cycle": {"pct_start": st.floats(0.05, 0.95), "div_factor": st.floats(1, 100)},
    "cyclic": {"step_size_up": length, "base_ratio": ratio},
    "plateau": {"factor": st.floats(0.1, 0.9), "min_ratio": ratio},
    "phases": {
        "phases": st.just([{"type": "linear", "steps": "30%"}, {"type": "cosine", "steps": "70%", "scale": 0.5}])
    },
}
FALLING = {
    "linear",
    "polynomial",
    "exponential",
    "step",
    "multistep",
    "inverse_sqrt",
    "warmup_stable_decay",
    "rex",
    "plateau",
}
WARMED = [name for name in OPTIONS if "warmup_steps" in SCHEDULES[name].model_fields]


@st.composite
def laid(draw: st.DrawFn, names: list[str]) -> LRSchedule:
    """Any of these schedules with any options that fit a run of up to 300 updates."""
    name = draw(st.sampled_from(names))
    horizon = Horizon(draw(st.integers(5, 300)), draw(st.integers(1, 40)))
    options = {key: draw(strategy) for key, strategy in OPTIONS[name].items()}
    if name in WARMED:
        options["warmup_steps"] = draw(st.one_of(st.just(0), length))
        options["warmup_shape"] = draw(st.sampled_from(["linear", "cosine"]))
        options["warmup_start"] = draw(st.sampled_from(["zero", "one", 0.3]))
    if "end" in SCHEDULES[name].model_fields:
        options["end"] = draw(st.sampled_from(["exclusive", "inclusive"]))
    options["cooldown_steps"] = draw(st.one_of(st.just(0), length))
    try:
        return SCHEDULES[name](**options).resolve(horizon)
    except ScheduleError:  # the options do not fit the run, which is said and tested elsewhere
        assume(False)
        raise


def table(schedule: LRSchedule) -> list[float]:
    return [schedule.multiplier(k, BASE_LR) for k in range(schedule.horizon.num_steps + 1)]


def test_every_schedule_of_ours_is_looked_at() -> None:
    assert set(OPTIONS) == set(SCHEDULES) - {"torch"}


@settings(max_examples=400, deadline=None)
@given(schedule=laid(list(OPTIONS)))
def test_finite_between_nothing_and_the_base_and_clamped(schedule: LRSchedule) -> None:
    values = table(schedule)
    assert all(math.isfinite(value) and 0 <= value <= 1 + ROUNDING for value in values)
    beyond = schedule.horizon.num_steps
    assert [schedule.multiplier(beyond + more, BASE_LR) for more in (1, 7, 10_000)] == [values[-1]] * 3
    assert schedule.lr(3, BASE_LR) == BASE_LR * values[3]


@settings(max_examples=200, deadline=None)
@given(schedule=laid(sorted(FALLING)))
def test_what_falls_never_rises_after_the_warmup(schedule: LRSchedule) -> None:
    values = table(schedule)[schedule.warmup.num_steps :]
    assert all(second <= first + ROUNDING for first, second in itertools.pairwise(values))


@settings(max_examples=200, deadline=None)
@given(schedule=laid(WARMED))
def test_the_warmup_rises_to_the_top_without_a_jump(schedule: LRSchedule) -> None:
    num_steps = schedule.warmup.num_steps
    assume(num_steps > 1 and num_steps + schedule.num_cooldown_steps < schedule.horizon.num_steps)
    values = table(schedule)[: num_steps + 1]
    steepest = (1 if schedule.warmup.shape == "linear" else math.pi / 2) / num_steps
    start = {"one": None, 0.0: 0.0, 0.3: 0.3}[schedule.warmup.start]
    assert start is None or values[0] == start
    assert all(0 <= second - first <= steepest + ROUNDING for first, second in itertools.pairwise(values[:-1]))
    assert values[-1] - values[-2] <= steepest + ROUNDING
    if schedule.name not in ("multistep", "plateau"):  # whose first drop may fall into the warm-up
        assert values[-1] == pytest.approx(1.0, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(floor=ratio, end=st.sampled_from(["exclusive", "inclusive"]), num_steps=st.integers(3, 300), data=st.data())
def test_a_floor_is_kept_and_reached_where_the_curve_ends(
    floor: float, end: str, num_steps: int, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["linear", "cosine", "cosine_with_restarts", "rex"]))
    warmup = data.draw(st.integers(0, num_steps - 2))
    options = {"min_ratio": floor, "end": end, "warmup_steps": warmup}
    schedule = SCHEDULES[name](**options).resolve(Horizon(num_steps, 10))
    values = table(schedule)
    assert min(values[warmup:]) >= floor - ROUNDING
    assert values[num_steps] == pytest.approx(floor, abs=ROUNDING)
    if end == "inclusive":
        assert values[num_steps - 1] == pytest.approx(floor, abs=ROUNDING)


STEEPEST = {"linear": 1.0, "cosine": math.pi / 2, "rex": 10.0}
"""Largest slope of the curve over p in [0, 1]; rex (d = 0.9) falls tenfold at its end."""


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(STEEPEST)), num_steps=st.integers(5, 300), data=st.data())
def test_smooth_curves_have_no_jump(name: str, num_steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, num_steps - 2))
    values = table(SCHEDULES[name](warmup_steps=warmup).resolve(Horizon(num_steps, 10)))[warmup:]
    steepest = STEEPEST[name] / (num_steps - warmup)
    assert all(abs(second - first) <= steepest + ROUNDING for first, second in itertools.pairwise(values))


@settings(max_examples=150, deadline=None)
@given(cycles=st.integers(1, 8), num_steps=st.integers(40, 400), warmup=st.integers(0, 10))
def test_restarts_jump_up_once_less_than_cycles_and_where_they_are_marked(
    cycles: int, num_steps: int, warmup: int
) -> None:
    schedule = SCHEDULES["cosine_with_restarts"](num_cycles=cycles, warmup_steps=warmup).resolve(Horizon(num_steps, 10))
    values = table(schedule)
    jumps = [k for k in range(warmup + 1, num_steps) if values[k] > values[k - 1]]
    marked = [mark.update for mark in schedule.marks if mark.label == "Restart"]
    assert len(jumps) == cycles - 1
    assert jumps == marked


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(WARMED), per_epoch=st.integers(1, 30), epochs=st.integers(5, 20), data=st.data())
def test_updates_epochs_and_percent_say_the_same(name: str, per_epoch: int, epochs: int, data: st.DataObject) -> None:
    """A warm-up of e epochs is e x E updates, and the share e / epochs where that is a whole percentage."""
    horizon = Horizon(per_epoch * epochs, per_epoch)
    warmup = data.draw(st.integers(1, epochs - 1))
    spellings: list[Any] = [warmup * per_epoch, f"{warmup}ep"]
    if 100 * warmup % epochs == 0:
        spellings.append(f"{100 * warmup // epochs}%")
    assert len({to_steps(spelling, horizon) for spelling in spellings}) == 1
    own = {**SCHEDULES[name].example} | ({"decay_steps": 1} if name == "warmup_stable_decay" else {})
    curves = {tuple(table(SCHEDULES[name](**own | {"warmup_steps": s}).resolve(horizon))) for s in spellings}
    assert len(curves) == 1


@given(num_steps=st.integers(1, 100_000), share=st.integers(0, 10_000))
def test_a_percentage_is_rounded_half_up_and_is_at_least_one(num_steps: int, share: int) -> None:
    horizon = Horizon(num_steps, 1)
    exact = num_steps * share / 10_000
    updates = to_steps(f"{share / 100:.2f}%", horizon)
    assert updates == 0 if share == 0 else updates >= 1
    assert updates == 1 or abs(updates - exact) <= 0.5 + 1e-6
    assert to_steps("5%", Horizon(30, 1)) == 2


@settings(max_examples=150, deadline=None)
@given(schedule=laid(list(OPTIONS)), data=st.data())
def test_a_cooldown_only_lowers_and_ends_at_zero(schedule: LRSchedule, data: st.DataObject) -> None:
    assume(schedule.num_cooldown_steps)
    values = table(schedule)
    start = schedule.horizon.num_steps - schedule.num_cooldown_steps
    bare = [schedule.core(k, BASE_LR) for k in range(max(start, schedule.warmup.num_steps), schedule.horizon.num_steps)]
    cooled = values[schedule.horizon.num_steps - len(bare) : -1]
    assert values[-1] == 0
    assert all(low <= high + ROUNDING for low, high in zip(cooled, bare, strict=True))
