"""The schedules beyond the classic six: golden values, and equality with torch and transformers at every update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from config_page import describe
from pydantic import TypeAdapter, ValidationError
from torch.optim import lr_scheduler as theirs

from lora_trainer.cli.schedules import list_schedules
from lora_trainer.config.load import check_source
from lora_trainer.config.source import Source
from lora_trainer.config.structure import all_keys, models_by_type
from lora_trainer.errors import ConfigError
from lora_trainer.schedules.registry import CLASSIC, ROWS, SCHEDULES, LRSchedulerOptions, allow_plugins
from lora_trainer.schedules.schedule import Horizon, LRSchedule, ScheduleError

BASE = {"name": "x", "model": {"path": "b"}, "data": {"dir": "d"}, "train": {"max_steps": 9}}
EXAMPLES: dict[str, dict[str, Any]] = {name: options.example for name, options in SCHEDULES.items()}


def laid(name: str, num_steps: int, steps_per_epoch: int = 10, **options: Any) -> LRSchedule:
    return ROWS[name](**options).resolve(Horizon(num_steps, steps_per_epoch))


def curve(schedule: LRSchedule, num_steps: int, base_lr: float = 1.0) -> list[float]:
    return [schedule.lr(k, base_lr) for k in range(num_steps)]


def stepped(build: Callable[[torch.optim.Optimizer], Any], num_steps: int, base_lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base_lr)
    scheduler = build(optimizer)
    lrs = []
    for _ in range(num_steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


GOLDEN = [
    ("warmup_stable_decay", {"warmup_steps": 2, "decay_steps": 4}, [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    ("inverse_sqrt", {"warmup_steps": 2}, [0, 0.5, 1, 0.816497, 0.707107, 0.632456, 0.577350, 0.534522, 0.5, 0.471405]),
    ("rex", {}, [1, 0.989011, 0.975610, 0.958904, 0.9375, 0.909091, 0.869565, 0.810811, 0.714286, 0.526316]),
    ("piecewise_constant", {"boundaries": [3, 6], "values": [1, 0.1, 0.01]}, [1] * 3 + [0.1] * 3 + [0.01] * 4),
]


@pytest.mark.parametrize(("name", "options", "expected"), GOLDEN)
def test_golden_values(name: str, options: dict[str, Any], expected: list[float]) -> None:
    assert curve(laid(name, 10, **options), 10) == pytest.approx(expected, abs=1e-6)


def test_exponential_per_step_golden() -> None:
    schedule = laid("exponential", 3000, unit="step", gamma=0.99)
    lrs = [schedule.lr(k, 5e-5) for k in (69, 230, 459)]
    assert lrs == pytest.approx([2.499e-5, 4.955e-6, 4.96e-7], rel=1e-3)
    assert schedule.lr(2999, 5e-5) == pytest.approx(5e-5 * 0.99**2999)


def test_exponential_spellings_agree() -> None:
    by_gamma = curve(laid("exponential", 100, 25, gamma=0.99), 100)
    assert by_gamma == pytest.approx(curve(laid("exponential", 100, 25, rate=-math.log(0.99)), 100))
    assert by_gamma[:25] == [1.0] * 25
    assert by_gamma[25] == pytest.approx(0.99)
    halved = laid("exponential", 100, unit="step", half_life=20)
    assert halved.multiplier(20, 1) == pytest.approx(0.5)
    ends = laid("exponential", 100, unit="step", final_ratio=0.01)
    assert ends.multiplier(100, 1) == pytest.approx(0.01)


def test_cosine_annealing_golden() -> None:
    schedule = laid("cosine_annealing", 3001, t_max=1000)
    lrs = [schedule.lr(k, 5e-5) for k in (0, 500, 1000, 1500, 2000, 3000)]
    assert lrs == pytest.approx([5e-5, 2.5e-5, 0, 2.5e-5, 5e-5, 0], abs=1e-15)


def test_step_and_multistep_golden() -> None:
    step = laid("step", 3000, step_size=500, gamma=0.1)
    lrs = [step.lr(k, 5e-5) for k in (499, 500, 1000, 1500, 2500)]
    assert lrs == pytest.approx([5e-5, 5e-6, 5e-7, 5e-8, 5e-10])
    milestones = laid("multistep", 3000, milestones=[1000, 2000], gamma=0.1)
    assert [milestones.lr(k, 5e-5) for k in (999, 1000, 1999, 2000)] == pytest.approx([5e-5, 5e-6, 5e-6, 5e-7])


def test_step_every_ten_epochs() -> None:
    halves = laid("step", 250, 10, step_size="10ep", gamma=0.5)
    assert [halves.lr(epoch * 10, 0.1) for epoch in (0, 9, 10, 19, 20)] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])
    tenths = laid("step", 250, 10, step_size="10ep")
    lrs = [tenths.lr(epoch * 10 + 9, 0.1) for epoch in (0, 9, 10, 19, 20)]
    assert lrs == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


TORCH = [
    ("cosine_annealing", {"t_max": 13, "eta_min": 1e-6}, lambda o, n: theirs.CosineAnnealingLR(o, 13, 1e-6)),
    (
        "cosine_warm_restarts",
        {"t_0": 7, "eta_min": 1e-6},
        lambda o, n: theirs.CosineAnnealingWarmRestarts(o, 7, 1, 1e-6),
    ),
    ("cosine_warm_restarts", {"t_0": 5, "t_mult": 2}, lambda o, n: theirs.CosineAnnealingWarmRestarts(o, 5, 2)),
    ("exponential", {"unit": "step", "gamma": 0.97}, lambda o, n: theirs.ExponentialLR(o, 0.97)),
    ("step", {"step_size": 9, "gamma": 0.3}, lambda o, n: theirs.StepLR(o, 9, 0.3)),
    ("multistep", {"milestones": [3, 5], "gamma": 0.2}, lambda o, n: theirs.MultiStepLR(o, [3, 5], 0.2)),
    ("one_cycle", {}, lambda o, n: theirs.OneCycleLR(o, o.param_groups[0]["lr"], n, cycle_momentum=False)),
    (
        "one_cycle",
        {"pct_start": 0.5, "div_factor": 10, "final_div_factor": 100},
        lambda o, n: theirs.OneCycleLR(
            o, o.param_groups[0]["lr"], n, pct_start=0.5, div_factor=10, final_div_factor=100, cycle_momentum=False
        ),
    ),
    (
        "cyclic",
        {"step_size_up": 6, "base_ratio": 0.1},
        lambda o, n: theirs.CyclicLR(
            o, o.param_groups[0]["lr"] * 0.1, o.param_groups[0]["lr"], 6, cycle_momentum=False
        ),
    ),
    (
        "cyclic",
        {"step_size_up": 6, "base_ratio": 0.1, "mode": "triangular2"},
        lambda o, n: theirs.CyclicLR(
            o, o.param_groups[0]["lr"] * 0.1, o.param_groups[0]["lr"], 6, mode="triangular2", cycle_momentum=False
        ),
    ),
]


@pytest.mark.parametrize("num_steps", [7, 100, 1000])
@pytest.mark.parametrize(("name", "options", "build"), TORCH)
def test_equals_torch_at_every_update(name: str, options: dict[str, Any], build: Any, num_steps: int) -> None:
    for base_lr in (1e-4, 3e-3):
        ours = curve(laid(name, num_steps, **options), num_steps, base_lr)
        expected = stepped(lambda optimizer: build(optimizer, num_steps), num_steps, base_lr)
        assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-12


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("num_steps", [50, 1000])
def test_equals_transformers_at_every_update(num_steps: int, warmup: int) -> None:
    decay = num_steps // 5
    pairs = [
        (
            laid("inverse_sqrt", num_steps, warmup_steps=warmup),
            lambda o: transformers.get_inverse_sqrt_schedule(o, warmup),
        ),
        *(
            (
                laid("warmup_stable_decay", num_steps, warmup_steps=warmup, decay_steps=decay, decay_shape=shape),
                lambda o, shape=shape: transformers.get_wsd_schedule(
                    o, warmup, decay, num_stable_steps=num_steps - warmup - decay, decay_type=shape
                ),
            )
            for shape in ("linear", "cosine", "1-sqrt")
        ),
    ]
    for ours, build in pairs:
        expected = stepped(build, num_steps, 1e-3)
        assert max(abs(a - b) for a, b in zip(curve(ours, num_steps, 1e-3), expected, strict=True)) < 1e-12


def test_phases_join_end_to_end_and_scale() -> None:
    schedule = laid(
        "phases",
        100,
        phases=[
            {"type": "constant_with_warmup", "steps": 20, "warmup_steps": 10},
            {"type": "constant", "steps": "30%"},
            {"type": "cosine", "steps": "5ep", "scale": 0.5},
        ],
    )
    values = curve(schedule, 100)
    assert values[:3] == pytest.approx([0, 0.1, 0.2])
    assert values[20:50] == [1.0] * 30
    assert values[50] == 0.5
    assert values[50:] == pytest.approx([0.5 * m for m in curve(laid("cosine", 50), 50)])
    assert [(m.update, m.label) for m in schedule.marks] == [(10, "End of warmup"), (20, "Phase 2"), (50, "Phase 3")]


def test_torch_schedules_are_tabulated_with_the_runs_numbers() -> None:
    schedule = laid("torch", 40, target="CosineAnnealingLR", args={"T_max": "num_updates", "eta_min": 1e-5})
    expected = stepped(lambda o: theirs.CosineAnnealingLR(o, 40, 1e-5), 40, 1e-3)
    assert curve(schedule, 40, 1e-3) == pytest.approx(expected, abs=1e-15)
    dotted = laid("torch", 40, target="torch.optim.lr_scheduler.StepLR", args={"step_size": 10})
    assert dotted.multiplier(10, 1e-3) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "NoSuchLR"}, "no torch scheduler"),
        ({"target": "ReduceLROnPlateau"}, "use type: plateau"),
        ({"target": "pathlib.Path"}, "no torch LR scheduler"),
        ({"target": "StepLR"}, "does not take these args"),
        ({"target": "StepLR", "args": {"step_sizes": 3}}, "does not take these args"),
    ],
)
@pytest.mark.usefixtures("trusting")
def test_what_is_no_torch_schedule(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        laid("torch", 10, **options).multiplier(0, 1e-3)


@pytest.fixture
def trusting() -> Iterator[None]:
    allow_plugins(True)
    yield
    allow_plugins(False)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "torch", "target": "evil_code.Scheduler"},
        {"type": "torch", "target": "torch.hub.load", "args": {"repo_or_dir": "x"}},
        {"type": "evil_code:run"},
        {"type": "torch.hub:load", "args": {"repo_or_dir": "x"}},
    ],
)
def test_code_that_a_config_names_runs_only_where_allowed(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ScheduleError, match="--allow-plugins"):
        TypeAdapter(LRSchedulerOptions).validate_python(options).resolve(Horizon(10, 5)).lr(0, 1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_a_function_of_the_libraries_is_a_torch_target(library: str) -> None:
    args = {"num_warmup_steps": 2, "num_training_steps": "num_updates"}
    target = f"{library}.optimization.get_cosine_schedule_with_warmup"
    schedule = laid("torch", 20, target=target, args=args)
    ours = laid("cosine", 20, warmup_steps=2)
    assert curve(schedule, 20) == pytest.approx(curve(ours, 20))


def sawtooth(num_updates: int, updates_per_epoch: int, low: float = 0.5) -> Callable[[int], float]:
    return lambda k: 1 - (1 - low) * (k % updates_per_epoch) / updates_per_epoch


def falls_below_zero(num_updates: int, updates_per_epoch: int) -> Callable[[int], float]:
    return lambda k: 1 - k


@pytest.mark.usefixtures("trusting")
def test_a_function_by_dotted_path_is_a_schedule() -> None:
    options = TypeAdapter(LRSchedulerOptions).validate_python({"type": f"{__name__}:sawtooth", "args": {"low": 0.2}})
    schedule = options.resolve(Horizon(20, 10))
    assert curve(schedule, 20) == pytest.approx([sawtooth(20, 10, 0.2)(k) for k in range(20)])


@pytest.mark.parametrize(
    ("path", "args", "said"),
    [
        (f"{__name__}:falls_below_zero", {}, "gives -1.0 at update 2"),
        (f"{__name__}:sawtooth", {"lwo": 0.2}, "does not take these args: .*lwo"),
        ("no.such.module:f", {}, "cannot be imported"),
        (f"{__name__}:absent", {}, "cannot be imported"),
        (":absent", {}, "cannot be imported"),
        (".:absent", {}, "cannot be imported"),
    ],
)
@pytest.mark.usefixtures("trusting")
def test_what_is_no_schedule_of_ones_own(path: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        TypeAdapter(LRSchedulerOptions).validate_python({"type": path, "args": args}).resolve(Horizon(10, 5))


def test_a_ramp_takes_the_same_factor_at_every_update() -> None:
    values = curve(laid("ramp", 5, start_ratio=0.01, end_ratio=100), 5)
    assert values == pytest.approx([0.01, 0.1, 1, 10, 100])
    inner = [math.exp((1 - k / 4) * math.log(0.01) + k / 4 * math.log(100)) for k in range(1, 4)]
    assert values == [0.01, *inner, 100]
    assert curve(laid("ramp", 3, start_ratio=1, end_ratio=0.25), 3) == pytest.approx([1, 0.5, 0.25])
    assert laid("ramp", 1, start_ratio=0.5, end_ratio=8).multiplier(0, 1e-4) == pytest.approx(0.5)
    cooled = laid("ramp", 10, start_ratio=0.1, end_ratio=1, cooldown_steps=4)
    assert cooled.multiplier(9, 1) == pytest.approx(0.25)
    assert cooled.warmup.num_steps == 0


@pytest.mark.parametrize(
    "options", [{"end_ratio": 1}, {"start_ratio": 0, "end_ratio": 1}, {"start_ratio": 1, "end_ratio": -1}]
)
def test_the_ends_of_a_ramp_are_given_and_above_zero(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(LRSchedulerOptions).validate_python({"type": "ramp", **options})


def test_a_hidden_schedule_is_used_by_name_and_stands_in_no_list() -> None:
    options = TypeAdapter(LRSchedulerOptions).validate_python({"type": "ramp", "start_ratio": 0.1, "end_ratio": 1})
    assert options.resolve(Horizon(2, 1)).name == "ramp"
    assert "ramp" not in SCHEDULES
    assert "ramp" not in models_by_type(("lr_scheduler",))
    assert not any(key.endswith(("start_ratio", "end_ratio")) for key in all_keys())
    assert not any(word in describe() for word in ("start_ratio", "end_ratio", "type: ramp"))
    assert "ramp" not in dict(list_schedules())
    with pytest.raises(ConfigError) as caught:
        check_source(Source(BASE | {"lr_scheduler": {"type": "rampp"}}))
    assert "ramp`" not in str(caught.value)
    assert "known: constant, constant_with_warmup, linear" in str(caught.value)
    check_source(Source(BASE | {"lr_scheduler": options.model_dump()}))


def test_union_names_and_classic_six_follow_from_the_rows() -> None:
    for name, kind in ROWS.items():
        chosen = TypeAdapter(LRSchedulerOptions).validate_python({"type": name, **kind.example})
        assert type(chosen) is kind
    assert list(SCHEDULES) == [name for name in ROWS if name != "ramp"]
    assert set(CLASSIC) == {
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    }


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("exponential", {}, "exactly one of"),
        ("exponential", {"gamma": 0.9, "rate": 0.1}, "exactly one of"),
        ("multistep", {"milestones": [5, 5]}, "ascend"),
        ("multistep", {"milestones": [5, 3]}, "ascend"),
        ("multistep", {"milestones": [10]}, "inside the run"),
        ("piecewise_constant", {"boundaries": [5], "values": [1, 2, 3]}, "need 2 values"),
        ("warmup_stable_decay", {"warmup_steps": 6, "decay_steps": 5}, "longer than"),
        ("step", {"step_size": 0}, "at least one"),
        ("inverse_sqrt", {"timescale": 0}, "at least one"),
        ("cosine_annealing", {"t_max": 5, "eta_min": 1.0}, "above the base"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        laid(name, 10, **options).multiplier(9, 1e-3)


def test_the_registry_has_every_name_and_each_explains_itself() -> None:
    assert len(SCHEDULES) >= 16
    for name, options in SCHEDULES.items():
        assert options.model_fields["type"].default == name
        assert options.summary
        assert options.limits
