"""The diagnosis inside the real loop: told, logged, equal after a resume, and never touching the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import spoil_losses
from test_resume import rows, stop_after

from lora_trainer.errors import NumericStop, StoppedBySignal
from lora_trainer.evidence.diagnosis.diagnose import diagnose
from lora_trainer.evidence.diagnosis.findings import State
from lora_trainer.evidence.diagnosis.log import read_run
from lora_trainer.tracking.metrics import read_rows

WATCHED = "validation={fraction: 0.3, every_steps: 1, max_cost: 1.0}"
TOO_COLD = ("optimizer.lr=1e-9", "lr_scheduler={type: constant}", WATCHED)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == name]


def test_a_run_that_never_starts_says_so_while_it_runs(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train_toy(*TOO_COLD, name="straight")
    (first, *_) = events(straight, "diagnosis")
    assert first["step"] == 2
    (finding,) = first["findings"]
    assert finding["state"] == "never-started"
    assert (finding["advice"][0]["key"], finding["advice"][0]["value"]) == ("optimizer.lr", 3e-9)
    shown = capsys.readouterr().out
    assert "never-started (high confidence): best held-out gain over the base 0.0000" in shown
    assert "->  optimizer.lr=3e-09" in shown
    assert len(events(straight, "early_report")) == 1

    for stop in (2, 2):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(StoppedBySignal):
                train_toy(*TOO_COLD)
    renamed = [{**row, **({"trial": "toy"} if "trial" in row else {})} for row in rows(straight)]
    assert renamed == rows(train_toy(*TOO_COLD))


def test_the_stored_run_is_judged_as_it_was_live(train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy(*TOO_COLD)
    log, run = read_run(run_dir)
    assert diagnose(log, run).verdict == log.verdict
    assert [row["lr"] for row in read_rows(run_dir / "metrics.jsonl") if "event" not in row] == [1e-9] * 6


def test_a_numeric_stop_is_diagnosed_with_its_images(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil_losses(monkeypatch, lambda call: True)
    with pytest.raises(NumericStop):
        train_toy("tracking.base_loss_every=null")
    run_dir = tmp_path / "runs" / "toy"
    (event,) = events(run_dir, "diagnosis")  # told once, not at each skip
    (finding,) = event["findings"]
    assert finding["state"] == "non-finite"
    assert ".png" in finding["advice"][0]["text"]
    log, run = read_run(run_dir)
    assert diagnose(log, run).of(State.NON_FINITE).numbers["skipped"] == 3


def test_probes_that_are_not_finite_are_told_and_not_fatal(train_toy: Callable[..., Path], tmp_path: Path) -> None:
    hot = ("optimizer.lr=0.5", "adapter.alpha=400", "adapter.targets=transformer+resnet", WATCHED)
    with pytest.raises(NumericStop):
        train_toy(*hot, "lr_scheduler={type: constant}")
    (event,) = events(tmp_path / "runs" / "toy", "diagnosis")
    (finding,) = event["findings"]
    assert "the held_out probe at step 2 is not finite" in finding["evidence"]
