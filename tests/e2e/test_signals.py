"""Signals: the update is finished, the state saved, 75 returned, whoever started the program and whoever was told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from faults import stop_after
from worlds import run_in_world

from lora_trainer.errors import ExitCode
from lora_trainer.tracking.metrics import step_rows

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]
TORCHRUN = ["torchrun", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "train.py"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(toy_config: Path) -> Iterator[Start]:
    """Start a run in a session of its own and wait until it trains; killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(command: list[str], *overrides: str) -> subprocess.Popen[str]:
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_", "RANK", "WORLD"))
        }
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        process = subprocess.Popen(
            [*command, "--config", str(toy_config), *(overrides or ["train.max_steps=20000"])],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                return process
        raise AssertionError(f"the run ended with {process.wait()}")

    yield begin
    for process in started:
        with_children = [process.pid, *(child.pid for child in children(process))]
        for pid in with_children:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def assert_saved_at_the_current_step(run_dir: Path) -> None:
    """The trainer may outlive its launcher by an update: wait for its last word."""
    deadline = time.monotonic() + 300
    while json.loads((run_dir / "exit.json").read_text())["code"] is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75
    rows = step_rows(run_dir / "metrics.jsonl")
    newest = max((run_dir / "checkpoints").iterdir()).name
    assert newest == f"step-{rows[-1]['step']:08d}"
    assert len(rows) == rows[-1]["step"] >= 3


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ([sys.executable, "train.py"], signal.SIGINT),
        ([sys.executable, "-m", "lora_trainer", "train"], signal.SIGTERM),
    ],
    ids=["train.py", "lora-trainer"],
)
def test_a_signal_saves_and_exits_with_75(
    start: Start, tmp_path: Path, command: list[str], number: signal.Signals
) -> None:
    process = start(command)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert_saved_at_the_current_step(tmp_path / "runs" / "toy")


def test_the_death_of_accelerate_reaches_the_trainer(start: Start, tmp_path: Path) -> None:
    process = start(["accelerate", "launch", "train.py"])
    process.kill()
    assert_saved_at_the_current_step(tmp_path / "runs" / "toy")


def test_ctrl_c_under_accelerate_is_one_request(start: Start, tmp_path: Path) -> None:
    """The terminal tells launcher and trainer, and then the launcher's end tells the trainer again."""
    process = start(["accelerate", "launch", "train.py"])
    os.killpg(process.pid, signal.SIGINT)
    assert_saved_at_the_current_step(tmp_path / "runs" / "toy")


def test_two_processes_stop_at_one_update_when_one_is_told(
    start: Start, train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Told under torchrun; three updates later, two processes have what they have without that stop."""
    overrides = ["train.max_steps=20000", "train.batch_size=1"]
    run_dir = tmp_path / "runs" / "toy"
    process = start(TORCHRUN, *overrides)
    ranks = {worker.environ()["RANK"]: worker for worker in children(process) if "RANK" in worker.environ()}
    ranks["1"].send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert_saved_at_the_current_step(run_dir)
    stopped = step_rows(run_dir / "metrics.jsonl")[-1]["step"]
    checkpoints = []
    for output, updates in (("runs", 3), ("straight", stopped + 3)):
        with monkeypatch.context() as patch:
            stop_after(patch, updates)
            train = partial(train_toy, *overrides, f"output_dir={tmp_path / output}")
            assert run_in_world(2, train) == [ExitCode.STOPPED] * 2
        checkpoints.append(tmp_path / output / "toy" / "checkpoints" / f"step-{stopped + 3:08d}")
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        resumed, straight = (checkpoint / name for checkpoint in checkpoints)
        assert resumed.read_bytes() == straight.read_bytes()
