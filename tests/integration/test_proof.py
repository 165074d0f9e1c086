"""It trains, proven: every layer that learns is counted, every one that does not is named with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import RICH, assert_same_run_twice

from lora_trainer.models.adapters.bank import AdapterBank
from lora_trainer.tracking.metrics import read_rows

Train = Callable[..., Path]
NUM_LAYERS = 32


def proofs(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == "proof"]


@pytest.mark.parametrize(("warmup", "step"), [(0, 2), (3, 3)])
def test_every_layer_learns(train_toy: Train, warmup: int, step: int) -> None:
    """With a warm-up the first update has LR 0, so the second that moves anything is the third."""
    warmed = f"{{type: constant_with_warmup, warmup_steps: {warmup}}}"
    options = f"lr_scheduler={warmed if warmup else '{type: constant}'}"
    gradient, movement = proofs(train_toy(options, "optimizer.weight_decay=0"))
    assert (gradient["claim"], gradient["step"]) == ("every B has a gradient", 1)
    assert (movement["claim"], movement["step"]) == ("every A and B has moved", step)
    assert (gradient["num_tensors"], movement["num_tensors"]) == (NUM_LAYERS, 2 * NUM_LAYERS)
    assert gradient["missing"] == movement["missing"] == {}


def test_a_layer_without_a_gradient_is_named(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = AdapterBank.__init__

    def attach(bank: AdapterBank, *arguments: Any, **named: Any) -> None:
        honest(bank, *arguments, **named)
        silenced = bank.parameters(bank.names[0])
        for name in silenced:
            if "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" in name:
                silenced[name].register_hook(lambda gradient: gradient * 0)

    monkeypatch.setattr(AdapterBank, "__init__", attach)
    gradient, movement = proofs(train_toy("lr_scheduler={type: constant}", "optimizer.weight_decay=0"))
    (named,) = gradient["missing"]
    assert named.endswith("attn1.to_q.lora_B.weight")
    assert "exactly 0" in gradient["missing"][named]
    assert len(movement["missing"]) == 2
    assert set(movement["missing"].values()) == {"nothing in the schedule explains it"}
    assert "1 of 32 tensors do not" in capsys.readouterr().out


def test_a_group_that_the_schedule_holds_still_is_explained(train_toy: Train) -> None:
    schedule = "{type: piecewise_constant, boundaries: [4], values: [0, 1]}"
    still = f"{{name: held, match: ['*attn1.to_q*'], lr: 1e-3, lr_scheduler: {schedule}}}"
    overrides = ("lr_scheduler={type: constant}", "optimizer.weight_decay=0", f"optimizer.groups=[{still}]")
    _, movement = proofs(train_toy(*overrides))
    assert movement["step"] == 2
    assert movement["missing"]
    assert set(movement["missing"].values()) == {"the LR of group held is 0 in the first 2 updates"}
    assert all("attn1.to_q" in name for name in movement["missing"])


def test_a_resume_repeats_the_proof_where_it_fell_due(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_run_twice(train_toy, monkeypatch, RICH, [1])
