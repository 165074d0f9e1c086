"""The program as a user starts it: launchers, processes, signals, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from lora_trainer.cli.program import main
from lora_trainer.tracking.metrics import step_rows

pytestmark = pytest.mark.process
Program = Callable[..., "subprocess.CompletedProcess[str]"]


def test_accelerate_launch_and_lora_trainer_give_the_same_bytes(
    program: Program, toy_config: Path, tmp_path: Path
) -> None:
    files = {}
    starts = {
        "accelerate": ["accelerate", "launch", "train.py", "--config"],
        "lora_trainer": [sys.executable, "-m", "lora_trainer", "train", "--config"],
    }
    for name, start in starts.items():
        words = [str(toy_config), f"output_dir={tmp_path / name}", "train.threads=auto"]
        run = program([*start, *words], OMP_WAIT_POLICY="passive")  # where cores are few, waiting threads take them
        assert run.returncode == 0, run.stdout + run.stderr
        assert "step 6/6  loss" in run.stdout
        assert "Traceback" not in run.stderr
        files[name] = (tmp_path / name / "toy" / "toy.safetensors").read_bytes()
        assert json.loads((tmp_path / name / "toy" / "exit.json").read_text())["code"] == 0
        assert Image.open(tmp_path / name / "toy" / "curves.png").size == (1000, 800)
        assert '<svg class="plot"' in (tmp_path / name / "toy" / "report.html").read_text()
    assert files["accelerate"] == files["lora_trainer"]


def test_two_processes_have_the_gradients_of_one(
    program: Program, train_toy: Callable[..., Path], toy_config: Path, tmp_path: Path
) -> None:
    common = ["export.dtype=fp32", "train.max_steps=5"]
    start = [
        *("torchrun", "--nproc_per_node", "2", "--master_port", "0", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "localhost:0", "train.py", "--config", str(toy_config), "train.batch_size=2"),
    ]
    run = program([*start, f"output_dir={tmp_path / 'two'}", *common])
    assert run.returncode == 0, run.stdout + run.stderr
    folders = (train_toy("train.batch_size=4", *common), tmp_path / "two" / "toy")
    one, two = (step_rows(folder / "metrics.jsonl") for folder in folders)
    assert [row["lr"] for row in one] == [row["lr"] for row in two]
    assert [row["epoch"] for row in one] == [row["epoch"] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-5)
    assert [row["grad_norm"] for row in one] == pytest.approx([row["grad_norm"] for row in two], rel=1e-4)
    files = [load_file(folder / "toy.safetensors") for folder in folders]
    for name, tensor in files[0].items():
        assert (tensor - files[1][name]).abs().max() < 1e-4, name


def test_two_processes_asked_of_accelerates_cpu_launcher_are_not_silently_one(
    program: Program, toy_config: Path
) -> None:
    run = program(["accelerate", "launch", "--cpu", "--num_processes", "2", "train.py", "--config", str(toy_config)])
    assert run.returncode != 0
    assert "torchrun --nproc_per_node 2 train.py" in run.stderr


def test_errors_have_codes_and_no_traceback(program: Program, toy_config: Path, tmp_path: Path) -> None:
    cases = {
        2: ["optimizer.lrr=1"],
        3: [f"data.dir={tmp_path / 'absent'}"],
        4: [f"model.path={tmp_path / 'absent'}"],
    }
    for code, overrides in cases.items():
        run = program([sys.executable, "-m", "lora_trainer", "train", "--config", str(toy_config), *overrides])
        assert run.returncode == code, run.stderr
        assert "Traceback" not in run.stderr
        assert "fix:" in run.stderr


def test_help_and_dry_run_never_load_torch(program: Program, toy_config: Path) -> None:
    starts = (["--help"], ["train", "--help"], ["train", "--config", str(toy_config), "--dry-run"])
    code = (
        "import sys; from lora_trainer.cli.program import main\n"
        f"for words in {starts!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert not end.code, words\n"
        "    assert 'torch' not in sys.modules, words"
    )
    run = program([sys.executable, "-c", code])
    assert run.returncode == 0, run.stderr
    assert "updates per epoch" in run.stdout
    assert "trainable parameters" in run.stdout


def test_sample_and_export_work_from_a_finished_run(
    program: Program, train_toy: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = train_toy("checkpoint.every_steps=3")
    lora = run_dir / "toy.safetensors"
    drawn = program(
        [
            *(sys.executable, "-m", "lora_trainer", "sample", "--lora", str(lora)),
            *("-p", "a cat", "-n", "2", "--steps", "2", "-o", str(tmp_path / "out")),
        ]
    )
    assert drawn.returncode == 0, drawn.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    other = tmp_path / "other.safetensors"
    for words in (
        [str(run_dir), "--step", "3", "-o", str(tmp_path / "early.safetensors")],
        [str(lora), "--layout", "diffusers", "-o", str(other)],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["export", *words])
        assert not ended.value.code
    assert load_file(tmp_path / "early.safetensors").keys() == load_file(lora).keys()
    assert other.read_bytes() == (run_dir / "diffusers" / "pytorch_lora_weights.safetensors").read_bytes()
