"""Numbers and warnings about a schedule: they fire where they should, and never on the defaults."""

from __future__ import annotations

from typing import Any

import pytest
from test_schedules import EXAMPLES

from lora_trainer.schedules.registry import SCHEDULES
from lora_trainer.schedules.schedule import Horizon, ScheduleFacts, facts_of


def facts(name: str, num_steps: int = 1000, **options: Any) -> ScheduleFacts:
    chosen = SCHEDULES[name](**options)
    return facts_of(chosen, chosen.resolve(Horizon(num_steps, 25)), 1e-4)


@pytest.mark.parametrize(
    ("name", "options", "budget"),
    [
        ("constant", {}, 1.0),
        ("warmup_stable_decay", {}, 0.90),
        ("rex", {}, 0.83),
        ("linear", {}, 0.50),
        ("cosine", {}, 0.50),
        ("cosine_with_restarts", {}, 0.50),
        ("polynomial", {"power": 2}, 0.334),
        ("exponential", {"unit": "step", "gamma": 0.99}, 0.10),
        ("exponential", {"unit": "step", "final_ratio": 0.01}, 0.215),
        ("multistep", {"milestones": [333, 667]}, 0.37),
    ],
)
def test_budgets(name: str, options: dict[str, Any], budget: float) -> None:
    assert facts(name, **options).budget == pytest.approx(budget, abs=0.005)


def test_half_life_and_shrink() -> None:
    assert facts("exponential", unit="step", gamma=0.99).half_life == 69
    assert facts("constant").half_life is None
    assert facts("linear", 100).half_life == 50
    assert facts("constant", 2000).shrink(0.01) == pytest.approx(0.002, rel=0.01)
    assert facts("constant", 2000).shrink(0.53) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("linear", {"warmup_steps": 600}, "more than half"),
        ("linear", {"warmup_steps": 1}, "only loses it"),
        ("cosine_annealing", {"t_max": 600}, "rising when training ends"),
        ("cyclic", {"step_size_up": 400, "base_ratio": 0.1}, "rising when training ends"),
        ("exponential", {"unit": "step", "gamma": 0.99}, "train next to nothing"),
        ("step", {"step_size": "15%"}, "train next to nothing"),
        ("cosine_with_restarts", {"num_cycles": 1}, "plain cosine"),
        ("phases", {"phases": [{"type": "constant", "steps": 400}]}, "sum to 400 updates, the run has 1000"),
        ("phases", {"phases": [{"type": "linear", "steps": 1400}]}, "sum to 1400"),
    ],
)
def test_warnings_fire(name: str, options: dict[str, Any], said: str) -> None:
    warnings = facts(name, **options).warnings
    assert len(warnings) == 1
    assert said in warnings[0]


@pytest.mark.parametrize("num_steps", [30, 1000, 5000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_warnings_stay_silent_on_defaults(name: str, num_steps: int) -> None:
    options = dict(EXAMPLES.get(name, {}))
    if name == "torch":
        options = {"target": "CosineAnnealingLR", "args": {"T_max": "num_updates"}}
    if name == "cosine_annealing":
        options = {"t_max": "100%"}
    if name == "cyclic":
        options = {"step_size_up": "50%", "base_ratio": 0.1}
    assert facts(name, num_steps, **options).warnings == ()
