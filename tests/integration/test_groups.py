"""Weights with learning rates and schedules of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_trainer.errors import ConfigError
from lora_trainer.models.adapters.targets import assign_param_groups
from lora_trainer.tracking.metrics import step_rows

pytestmark = pytest.mark.quick

GROUPS = (
    "optimizer.groups=[{name: up, match: ['up_blocks.*.to_q'], lr: 5e-4},"
    " {name: loraplus, match: [lora_B.weight], lr_scheduler: {type: constant}}]"
)


def test_each_group_has_its_own_curve_and_the_optimizer_uses_it(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[list[float]] = []
    sizes: list[list[int]] = []
    honest = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        used.append([group["lr"] for group in self.param_groups])
        sizes.append([len(group["params"]) for group in self.param_groups])
        return honest(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run_dir = train_toy(GROUPS)
    rows = step_rows(run_dir / "metrics.jsonl")
    assert [[row["lr/unet"], row["lr/up"], row["lr/loraplus"]] for row in rows] == used
    assert [row["lr"] for row in rows] == [row["lr/unet"] for row in rows]
    assert [row["lr/up"] for row in rows] == pytest.approx([row["lr/unet"] / 2 for row in rows])
    assert {row["lr/loraplus"] for row in rows} == {1e-3}
    assert sizes[0] == [28, 8, 28]


def test_groups_take_the_first_match_and_none_is_left_empty() -> None:
    weights = [f"{layer}.lora_{kind}.weight" for layer in ("a.to_q", "a.to_k") for kind in "AB"]
    assigned = assign_param_groups(weights, {"q": ["to_q"], "b": ["lora_B.weight"]}, "rest")
    assert assigned == {"rest": ["a.to_k.lora_A.weight"], "q": weights[:2], "b": ["a.to_k.lora_B.weight"]}
    with pytest.raises(ConfigError, match="no weight is left for the group `b`"):
        assign_param_groups(weights, {"all": ["lora_B.weight"], "b": ["lora_B.weight"]}, "rest")
    with pytest.raises(ConfigError, match="no weight is left for the group `rest`"):
        assign_param_groups(weights, {"all": ["*"]}, "rest")


def test_a_schedule_that_does_not_fit_its_group_names_it(train_toy: Callable[..., Path]) -> None:
    groups = "optimizer.groups=[{name: b, match: [lora_B.weight], lr_scheduler: {type: linear, warmup_steps: 6}}]"
    with pytest.raises(ConfigError, match=r"optimizer\.groups\[0\]\.lr_scheduler"):
        train_toy(groups)
