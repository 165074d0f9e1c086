"""World size and accumulation: neither the LR nor the gradients know of them. Real processes, their own logs."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import before_updates, spoil_losses
from safetensors.torch import load_file
from worlds import run_in_world

from lora_trainer.errors import ExitCode, SystemSetupError
from lora_trainer.schedules.registry import SCHEDULES
from lora_trainer.schedules.schedule import Horizon
from lora_trainer.tracking.metrics import read_rows, step_rows
from lora_trainer.training.optimizer_step import OptimizerStep

GLOBAL_BATCH = 16
NUM_UPDATES = 4
WORLDS = [world for world in itertools.product((1, 2, 4), (1, 4)) if world != (1, 1)]
RESTARTS = "lr_scheduler={type: cosine_with_restarts, num_cycles: 2, warmup_steps: 1}"


@pytest.fixture
def train_world(train_toy: Callable[..., Path], toy_images: Path, tmp_path: Path) -> Callable[[int, int], Path]:
    """Train 24 samples a global batch of 16 at a time, split over processes and accumulation; the run directory."""

    def run(num_processes: int, accumulation: int) -> Path:
        name = f"world{num_processes}x{accumulation}"
        overrides = (
            f"data={{sources: [{{dir: {json.dumps(str(toy_images))}, repeats: 4}}], resolution: 64, flip: true}}",
            f"train.batch_size={GLOBAL_BATCH // num_processes // accumulation}",
            f"train.gradient_accumulation_steps={accumulation}",
            f"train.max_steps={NUM_UPDATES}",
            "export.dtype=fp32",
            RESTARTS,
        )
        if num_processes == 1:
            train_toy(*overrides, name=name)
        else:
            codes = run_in_world(num_processes, lambda: train_toy(*overrides, name=name))
            assert codes == [0] * num_processes
        return tmp_path / "runs" / name

    return run


@pytest.mark.process
def test_worlds_and_accumulation_change_neither_lr_nor_gradients(train_world: Callable[[int, int], Path]) -> None:
    whole = train_world(1, 1)
    rows, weights = step_rows(whole / "metrics.jsonl"), load_file(whole / f"{whole.name}.safetensors")
    schedule = SCHEDULES["cosine_with_restarts"](num_cycles=2, warmup_steps=1).resolve(Horizon(NUM_UPDATES, 2))
    assert [row["lr"] for row in rows] == [schedule.lr(k, 1e-3) for k in range(NUM_UPDATES)]
    for num_processes, accumulation in WORLDS:
        split = train_world(num_processes, accumulation)
        for one, other in zip(rows, step_rows(split / "metrics.jsonl"), strict=True):
            assert other["lr"] == one["lr"]
            assert other["epoch"] == one["epoch"]
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        for key, tensor in load_file(split / f"{split.name}.safetensors").items():
            assert torch.allclose(tensor, weights[key], atol=1e-4), (split.name, key)


@pytest.mark.process
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_in_the_same_update(
    train_toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_losses(monkeypatch, lambda call: call >= 2 and os.environ["RANK"] == "1")
    overrides = ("train.batch_size=1", "tracking.base_loss_every=null", "train.max_steps=8")
    codes = run_in_world(2, lambda: train_toy(*overrides, name="poisoned"))
    assert codes == [ExitCode.NUMERIC] * 2
    run_dir = tmp_path / "runs" / "poisoned"
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    assert [row["step"] for row in rows if "event" not in row] == [1, 2]
    assert [len(row["files"]) for row in rows if row.get("event") == "skip"] == [2, 2, 2]
    assert [row["step"] for row in rows if row.get("event") == "failed"] == [5]
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000005"
    for tensor in load_file(checkpoint / "adapter.safetensors").values():
        assert torch.isfinite(tensor).all()


def test_a_world_whose_processes_do_not_meet_is_refused(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster that exports WORLD_SIZE, where a plain start would silently train on half of the images."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemSetupError, match="2 processes are announced"):
        train_toy()


@pytest.mark.process
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_is_named_by_the_other(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], killed: int
) -> None:
    def die(step: OptimizerStep, k: int) -> None:
        if k == 2 and int(os.environ["RANK"]) == killed:
            os.kill(os.getpid(), signal.SIGKILL)

    before_updates(monkeypatch, die)

    def work() -> None:
        try:
            train_toy("train.batch_size=1", name="halved")
        except SystemSetupError as error:
            print(error, file=sys.stderr)
            raise

    codes = run_in_world(2, work)
    assert sorted(codes) == [-signal.SIGKILL, ExitCode.ENVIRONMENT]
    assert f"the process of rank {killed} has ended" in capfd.readouterr().err
