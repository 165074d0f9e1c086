"""Screens, logs and pictures are not state: what befalls them ends no run and changes no exit code."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import refusing
from worlds import run_in_a_process

from lora_trainer.cli import surroundings
from lora_trainer.storage import atomic_files
from lora_trainer.storage.checkpoint import open_checkpoint
from lora_trainer.tracking import console as console_module
from lora_trainer.tracking.console import MainConsole
from lora_trainer.tracking.metrics import StepRow, read_rows, step_rows

Train = Callable[..., Path]


def exit_file(run_dir: Path) -> Any:
    return json.loads((run_dir / "exit.json").read_text())


@pytest.fixture
def run_on_screen(toy_config: Path) -> Callable[..., int]:
    """Start the program in a process of its own whose stdout is a descriptor or file given; its exit code."""

    def start(screen: Any, *overrides: str, encoding: str = "utf-8") -> int:
        def work() -> None:
            descriptor = screen() if callable(screen) else screen
            os.dup2(descriptor, 1)
            sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding=encoding)
            from lora_trainer.cli.program import main

            with pytest.raises(SystemExit) as ended:
                main(["train", "--config", str(toy_config), *overrides])
            sys.stdout.flush()
            assert ended.value.code == 0

        return run_in_a_process(work)

    return start


@pytest.mark.process
@pytest.mark.parametrize("fault", ["no reader", "full disk", "closed"])
def test_a_screen_that_is_gone(run_on_screen: Callable[..., int], tmp_path: Path, fault: str) -> None:
    def screen() -> int:
        if fault == "full disk":
            return os.open("/dev/full", os.O_WRONLY)
        reader, writer = os.pipe()
        os.close(reader if fault == "no reader" else writer)
        return writer if fault == "no reader" else reader  # a descriptor that refuses to be written

    assert run_on_screen(screen) == 0
    assert exit_file(tmp_path / "runs" / "toy")["code"] == 0


@pytest.mark.process
def test_a_screen_that_lacks_a_letter(run_on_screen: Callable[..., int], tmp_path: Path) -> None:
    with (tmp_path / "screen").open("wb") as screen:
        assert run_on_screen(screen.fileno(), "name=zoé", encoding="ascii") == 0
    assert b"zo?.safetensors" in (tmp_path / "screen").read_bytes()
    assert (tmp_path / "runs" / "zoé" / "zoé.safetensors").is_file()


@pytest.mark.process
def test_a_plot_backend_of_a_notebook_and_a_screen_without_reader() -> None:
    """The whole program, as Colab starts it; nothing is read of what it says."""
    words = ["schedules", "plot", "cosine", "--terminal"]
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "FORCE_COLOR": "1"}
    command = [sys.executable, "-m", "lora_trainer", *words]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout, "no colours where nobody sees them"
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run(command, env=environment, stdout=writer, check=False).returncode == 0
    os.close(writer)


def test_settling_leaves_streams_of_others_alone(capsys: pytest.CaptureFixture[str]) -> None:
    stdout = sys.stdout
    surroundings.settle()
    assert sys.stdout is stdout


def test_pictures_and_pages_that_fail(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_font(*_: object, **__: object) -> None:
        raise RuntimeError("In FT2Font: Could not set the fontsize")

    for name in ("draw_curves", "draw_grid"):
        monkeypatch.setattr(f"lora_trainer.report.pictures.{name}", no_font)
    monkeypatch.setattr("lora_trainer.report.page.write_report", no_font)
    run_dir = train_toy("sample={prompts: [a], num_inference_steps: 1}")
    assert (run_dir / "toy.safetensors").is_file()
    assert exit_file(run_dir)["code"] == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "Could not set the fontsize" in line]
    assert [line.split(" could not")[0] for line in told] == ["the grid of samples", "curves.png", "report.html"]


@pytest.mark.parametrize("fault", ["import", "start", "event"])
def test_tensorboard_that_fails(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    from lora_trainer.tracking import tensorboard

    def broken(*_: object) -> None:
        raise TypeError("Descriptors cannot be created directly")

    if fault == "import":
        monkeypatch.setitem(sys.modules, "lora_trainer.tracking.tensorboard", types.ModuleType("empty"))
    elif fault == "start":
        monkeypatch.setattr(tensorboard, "EventFileWriter", broken)
    else:
        monkeypatch.setattr(tensorboard.EventFileWriter, "add_event", broken)
    if fault == "event":  # its own first event is one, too
        monkeypatch.setattr(tensorboard.EventFileWriter, "__init__", lambda self, folder: None)
    run_dir = train_toy("tracking.tensorboard=true")
    assert exit_file(run_dir)["code"] == 0
    assert sum("TensorBoard's" in line for line in capsys.readouterr().out.splitlines()) == 1


def test_tensorboard_has_held_out_loss_ratio_and_samples(train_toy: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from toys import WATCHED

    sample = "sample={prompts: [a], num_inference_steps: 1}"
    run_dir = train_toy("tracking={tensorboard: true, base_loss_every: 1}", WATCHED, sample)
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert {"loss/held_out", "train/ratio"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("samples/01")] == [0, 6]
    held_out = [row["relative"] for row in read_rows(run_dir / "metrics.jsonl") if row.get("probe") == "held_out"]
    assert [event.value for event in events.Scalars("loss/held_out")] == pytest.approx(held_out)


def test_a_full_disk_under_the_log_alone(train_toy: Train, capsys: pytest.CaptureFixture[str]) -> None:
    straight = train_toy("checkpoint.every_steps=2")
    straight = straight.rename(straight.with_name("straight"))
    capsys.readouterr()
    with atomic_files.observe_operations(refusing("append", "metrics.jsonl", errno.ENOSPC)):
        run_dir = train_toy("checkpoint.every_steps=2")
    assert "the last lines of toy's log could not be written" in capsys.readouterr().out
    assert exit_file(run_dir)["code"] == 0
    assert open_checkpoint(run_dir / "checkpoints", None).state["step"] == 6, "the log keeps nobody from a checkpoint"
    assert (run_dir / "toy.safetensors").read_bytes() == (straight / "toy.safetensors").read_bytes()


def test_exit_json_says_running_and_names_a_bug(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def look(path: Path, *_: object, **__: object) -> None:
        seen.append(exit_file(path.parent))
        raise KeyError("a fault of ours")

    monkeypatch.setattr("lora_trainer.training.writers.write_lora", look)
    with pytest.raises(KeyError):
        train_toy()
    assert (seen[0]["code"], seen[0]["status"]) == (None, "running")
    assert exit_file(tmp_path / "runs" / "toy")["code"] == 1


def test_samples_that_the_disk_refuses(train_toy: Train) -> None:
    with atomic_files.observe_operations(refusing("write", "step-0000", errno.ENOSPC)):
        run_dir = train_toy("sample={prompts: [a], num_inference_steps: 1, every_steps: 2}")
    assert exit_file(run_dir)["code"] == 0
    assert (run_dir / "toy.safetensors").is_file()


def test_rows_have_the_seconds_of_all_starts(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    run_dir = train_toy("checkpoint.every_steps=2")
    seconds = [row["elapsed_s"] for row in read_rows(run_dir / "metrics.jsonl")]
    assert all(0 < before < after for before, after in itertools.pairwise(seconds))
    now[0] = 5.0  # after a reboot
    train_toy("train.max_steps=8", "resume={allow_changes: [train.max_steps], schedule: stretch}")
    later = [row["elapsed_s"] for row in step_rows(run_dir / "metrics.jsonl") if row["step"] > 6]
    assert seconds[-1] <= later[0] < seconds[-1] + 60


def rows(num: int) -> list[StepRow]:
    return [
        StepRow(step, "t", 0.1, float(step), {"unet": 1.75e-4}, 1.0, False, 6.0, 1.0, "d") for step in range(1, num + 1)
    ]


def test_piped_output_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    with MainConsole().training(1000, 0) as line:
        for row in rows(1000):
            now[0] += 1
            line.step(row)
    told = capsys.readouterr().out.splitlines()
    assert [text.split()[1] for text in told[:4]] == ["1/1000", "2/1000", "3/1000", "33/1000"]
    assert told[-1].startswith("step 1000/1000  loss 950.5000 (mean of 100)")
    assert len(told) < 40


def test_progress_is_whole_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    console, screen = MainConsole(), io.StringIO()
    console.rich = Console(file=screen, width=80, force_terminal=True, color_system=None)
    with console.training(15000, 0) as line:
        for row in rows(200):
            line.step(row)
    last = screen.getvalue().splitlines()[-2].rpartition("\x1b[2K")[2]
    assert "200/15000" in last and "loss 150.5000 lr 1.7e-04 6.0/s" in last and "…" not in last
    assert len(last.rstrip()) <= 80 and last.count(":") >= 4, "time gone and time left"


DO_IT_AGAIN = ("lora-trainer train --config out/toy/config.yaml", "lora-trainer report out/toy")


def test_do_it_again_works_as_it_is_printed(
    toy_config: Path,
    toy_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import shlex

    from lora_trainer.cli.program import main
    from lora_trainer.report.page import Rules, build_page
    from lora_trainer.report.runs import read_runs

    (tmp_path / "my pictures").symlink_to(toy_images)
    monkeypatch.chdir(tmp_path)
    first = "lora-trainer train -c toy.yaml output_dir=out 'data.dir=my pictures'"
    for command in (first, *DO_IT_AGAIN):
        with pytest.raises(SystemExit, match="0"):
            main(shlex.split(command)[1:])
    assert build_page(read_runs([tmp_path / "out" / "toy"]), Rules()).commands == DO_IT_AGAIN
    assert "this run is finished; nothing to do" in capsys.readouterr().out
