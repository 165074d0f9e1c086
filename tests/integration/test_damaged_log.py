"""A damaged metrics.jsonl: the lines that hold no row are left out and counted; training and its LoRA do not mind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from test_resume import outputs, stop_after

from lora_trainer.cli import train as train_command
from lora_trainer.cli.report import diagnose_run, report
from lora_trainer.errors import StoppedBySignal
from lora_trainer.tracking.metrics import read_lines, read_rows, step_rows

WATCHED = "validation={fraction: 0.3, every_steps: 1, max_cost: 1.0}"
ROW = json.dumps({"step": 2, "trial": "t", "lr": 1e-3, "grad_norm": 0.5, "note": "x" * 200}).encode() + b"\n"


def in_place(content: bytes) -> Callable[[bytes], bytes]:
    """Instead of a line, filled up with blanks, so that the lines after it stay where the checkpoint knows them."""
    return lambda line: content.ljust(len(line) - 1) + b"\n"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "NULs inside": lambda line: line[:10] + bytes(20) + line[30:],
    "NULs alone": lambda line: bytes(len(line) - 1) + b"\n",
    "cut in the middle": lambda line: in_place(line[: len(line) // 2])(line),
    "no JSON": in_place(b"hello"),
    "no text": in_place(b"\xff\xfe\x80"),
    "a list": in_place(b"[1, 2]"),
    "null": in_place(b"null"),
    "an object that is no row": in_place(b"{}"),
    "an update without its numbers": in_place(b'{"step": 2}'),
    "a step that is no number": in_place(b'{"step": "2", "event": "resume"}'),
    "too deep": lambda line: b"[" * 100_000 + line,
    "too many digits": lambda line: b'{"event": "x", "step": ' + b"9" * 5000 + b"}\n",
}


def damage_line(log: Path, number: int, damage: str) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    lines[number] = DAMAGES[damage](lines[number])
    log.write_bytes(b"".join(lines))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_left_out_and_the_others_are_read(tmp_path: Path, damage: str) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(ROW * 3)
    assert len(list(read_rows(log))) == 3
    damage_line(log, 1, damage)
    assert [row is None for row in read_lines(log)] == [False, True, False]
    assert list(read_rows(log)) == [json.loads(ROW)] * 2


@pytest.mark.parametrize("overrides", [(), (WATCHED,)], ids=["plain", "watched"])
def test_training_goes_on_with_damaged_lines(
    train_toy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
) -> None:
    straight = train_toy(*overrides)
    straight = straight.rename(straight.with_name("straight"))
    with monkeypatch.context() as patch, pytest.raises(StoppedBySignal):
        stop_after(patch, 5)
        train_toy(*overrides)
    log = straight.with_name("toy") / "metrics.jsonl"
    updates = [number for number, line in enumerate(log.read_bytes().splitlines()) if b'"draws"' in line]
    for number, damage in zip(updates[1:4], ("NULs inside", "cut in the middle", "a list"), strict=True):
        damage_line(log, number, damage)
    capsys.readouterr()
    run_dir = train_toy(*overrides)
    note = f"{log}: 3 damaged line(s) are left out"
    assert capsys.readouterr().out.count(note) == 1
    assert outputs(run_dir) == outputs(straight)
    assert [row["step"] for row in step_rows(log)] == [1, 5, 6]

    diagnose_run(run_dir, as_json=False, check=False)
    said = capsys.readouterr().out
    assert said.count(note) == 1
    assert "at step 6 of 6" in said
    diagnose_run(run_dir, as_json=True, check=False)
    assert json.loads(capsys.readouterr().out)["damaged_lines"] == 3
    report([run_dir], None, 0.01)
    assert (run_dir / "report.html").read_text().count("metrics.jsonl of toy: 3 damaged line(s) are left out") == 1


@pytest.mark.parametrize("overrides", [(), (WATCHED,)], ids=["plain", "watched"])
def test_training_goes_on_with_a_log_that_was_cut_inside_a_line(
    train_toy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    overrides: tuple[str, ...],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(StoppedBySignal):
        stop_after(patch, 3)
        train_toy(*overrides)
    log = tmp_path / "runs" / "toy" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    capsys.readouterr()
    run_dir = train_toy(*overrides)
    said = capsys.readouterr().out
    assert re.search(r"shorter .* step 3\b", said)
    assert said.count("1 damaged line(s) are left out") == 1
    assert [row["step"] for row in step_rows(log)][-3:] == [4, 5, 6]
    assert (run_dir / "report.html").is_file()


def test_a_log_of_which_nothing_is_left_ends_no_run(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(StoppedBySignal):
        stop_after(patch, 5)
        train_toy(WATCHED)
    run_dir = tmp_path / "runs" / "toy"
    log = run_dir / "metrics.jsonl"
    log.write_bytes(b"\0\n" * (log.stat().st_size // 2))
    train_toy(WATCHED)
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
    diagnose_run(run_dir, as_json=False, check=False)


def test_a_sweep_tells_which_trials_log_is_damaged(
    sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    grid = "{grid: {optimizer.lr: [1e-3, 2e-3]}}"

    class Stop(train_command.StopRequest):
        polls = 0

        def __call__(self) -> bool:
            self.polls += 1
            return self.polls >= 3

    with monkeypatch.context() as patch, pytest.raises(StoppedBySignal):
        patch.setattr(train_command, "StopRequest", Stop)
        sweep(grid)
    log = tmp_path / "runs" / "toy" / "trials" / "lr1e-3-seed42" / "metrics.jsonl"
    damage_line(log, 3, "NULs inside")
    capsys.readouterr()
    sweep_dir = sweep(grid)
    assert capsys.readouterr().out.count("damaged line(s) are left out") == 1
    assert {trial["status"] for trial in json.loads((sweep_dir / "sweep.json").read_text())["trials"]} == {"finished"}
