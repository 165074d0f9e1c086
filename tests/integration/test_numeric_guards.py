"""Numbers that are not finite: never applied, never saved, named."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_trainer.errors import DataError, ExitCode, NumericStop
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.storage.checkpoint import open_checkpoint
from lora_trainer.tracking.metrics import read_rows, step_rows
from lora_trainer.training.optimizer_step import Updater

Train = Callable[..., Path]


def skips(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == "skip"]


def at_attempt(monkeypatch: pytest.MonkeyPatch, change: Callable[[Updater, int], None]) -> None:
    """Call `change` with the updater and the attempt before each attempt."""
    honest = Updater.run

    def run(self: Updater, attempt: int, step: int, **named: Any) -> Any:
        change(self, attempt)
        return honest(self, attempt, step, **named)

    monkeypatch.setattr(Updater, "run", run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped_as_if_its_attempt_had_never_been(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    with monkeypatch.context() as patch:
        poisoned: list[torch.utils.hooks.RemovableHandle] = []

        def poison(updater: Updater, attempt: int) -> None:
            while poisoned:
                poisoned.pop().remove()
            if attempt == 2:
                parameter = next(iter(updater._trials[0].parameters.values()))
                poisoned.append(parameter.register_hook(lambda gradient: gradient * value))

        at_attempt(patch, poison)
        skipped = train_toy("train.ema_decay=0.9", name="toy")
    (skip,) = skips(skipped)
    assert skip["reason"] == "gradient"
    assert len(skip["files"]) == 2
    skipped = skipped.rename(skipped.with_name("skipped"))

    honest = Updater.run
    monkeypatch.setattr(
        Updater, "run", lambda self, attempt, step, **named: honest(self, attempt + (attempt >= 2), step, **named)
    )
    passed_over = train_toy("train.ema_decay=0.9", name="toy")
    assert (skipped / "toy.safetensors").read_bytes() == (passed_over / "toy.safetensors").read_bytes()


def test_fp16_overflow_does_not_move_the_schedule(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = [row["lr"] for row in step_rows(train_toy(name="fp32") / "metrics.jsonl")]
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**28))
    run_dir = train_toy("train.precision=fp16", name="fp16")
    overflows = skips(run_dir)
    assert len(overflows) > 3  # more than the skips in a row that end a run for any other reason
    assert {skip["reason"] for skip in overflows} == {"fp16 overflow"}
    rows = step_rows(run_dir / "metrics.jsonl")
    assert [row["lr"] for row in rows] == straight
    assert rows[-1]["attempt"] == 6 + len(overflows)


@pytest.mark.parametrize("part", ["adapter", "optimizer", "average"])
def test_no_part_of_the_state_is_saved_with_a_nan(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str
) -> None:
    def poison(updater: Updater, attempt: int) -> None:
        if attempt == 3:
            parts, _ = updater._trials[0].state()
            next(t for name, t in parts[part].items() if t.numel() > 1).view(-1)[0] = float("nan")

    at_attempt(monkeypatch, poison)
    with pytest.raises(NumericStop):
        train_toy("train.ema_decay=0.9", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    newest = open_checkpoint(tmp_path / "runs" / "toy" / "checkpoints", None)
    assert newest.progress.step == 3
    for tensors in newest.parts().values():
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())


def test_a_prompt_whose_embedding_is_not_finite_is_named(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = StableDiffusion.encode_prompts

    def spoilt(self: StableDiffusion, tokenizer: Any, encoder: Any, prompts: list[str]) -> torch.Tensor:
        return honest(self, tokenizer, encoder, prompts) * (float("nan") if prompts == ["picture 3"] else 1)

    monkeypatch.setattr(StableDiffusion, "encode_prompts", spoilt)
    with pytest.raises(DataError, match="'picture 3': the prompt's embedding is not finite"):
        train_toy(f"data.cache_dir={tmp_path / 'own-cache'}")


def test_a_loss_that_is_not_finite_is_skipped_and_named_and_three_stop(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_trainer.diffusion.objective import Objective

    calls = iter(range(1000))
    honest = Objective.loss
    poisoned = {2}

    def loss(self: Objective, *arguments: Any) -> Any:
        value = honest(self, *arguments)
        return value * float("nan") if next(calls) in poisoned else value

    monkeypatch.setattr(Objective, "loss", loss)
    run_dir = train_toy("tracking.base_loss_every=null", name="once")
    steps = [row for row in read_rows(run_dir / "metrics.jsonl") if "event" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["attempt"] for row in steps] == [1, 2, 4, 5, 6, 7]
    (skip,) = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == "skip"]
    assert len(skip["files"]) == 2

    calls = iter(range(1000))
    poisoned = set(range(3, 1000))
    with pytest.raises(NumericStop) as caught:
        train_toy("tracking.base_loss_every=null", name="always")
    assert caught.value.exit_code == ExitCode.NUMERIC == 6
    always = run_dir.with_name("always")
    assert max((always / "checkpoints").iterdir()).name == "step-00000003"
    assert json.loads((always / "exit.json").read_text())["code"] == 6
