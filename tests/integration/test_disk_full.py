"""A full disk: checked before, survived while it lasts, and never at the cost of what is saved."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import refusing

from lora_trainer.errors import ExitCode, SystemSetupError
from lora_trainer.storage import atomic_files, checkpoint, disk_space
from lora_trainer.storage.atomic_files import AppendLog
from lora_trainer.storage.checkpoint import newest_checkpoint, open_checkpoint, save_checkpoint
from lora_trainer.tracking import tensorboard
from lora_trainer.tracking.metrics import read_rows
from lora_trainer.training import writers

Train = Callable[..., Path]


def save(folder: Path, step: int, value: float = 0) -> Path:
    return save_checkpoint(folder, step, {"adapter": {"w": torch.full((3,), value)}}, {"value": value})


def test_too_little_room_is_said_before_anything_is_loaded(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: 1000)
    with pytest.raises(SystemSetupError, match="too little room") as caught:
        train_toy()
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert "free are 0.0 MiB" in str(caught.value)


def test_training_goes_on_without_checkpoints_and_the_lora_is_the_same(
    train_toy: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train_toy("checkpoint.every_steps=2")
    straight = straight.rename(straight.with_name("straight"))
    with atomic_files.observe_operations(refusing("write", "adapter", errno.ENOSPC)):
        run_dir = train_toy("checkpoint.every_steps=2")
    assert (run_dir / "toy.safetensors").read_bytes() == (straight / "toy.safetensors").read_bytes()
    assert "step 2: the disk took no checkpoint" in capsys.readouterr().out
    events = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == "disk"]
    assert [event["step"] for event in events] == [2, 4, 6]
    assert not list((run_dir / "checkpoints").iterdir())
    with pytest.raises(SystemSetupError, match="has its LoRA but no checkpoint"):
        train_toy("checkpoint.every_steps=2")


def test_stop_leaves_a_lora_of_its_step_and_whole_checkpoints(train_toy: Train, tmp_path: Path) -> None:
    overrides = ("checkpoint={every_steps: 2, on_disk_full: stop}",)
    with (
        pytest.raises(SystemSetupError, match="stopped at step 4: the disk took no checkpoint"),
        atomic_files.observe_operations(refusing("rename", "step-00000004", errno.EIO)),
    ):
        train_toy(*overrides)
    run_dir = tmp_path / "runs" / "toy"
    assert (run_dir / "toy-step00000004.safetensors").is_file()
    assert json.loads((run_dir / "exit.json").read_text())["code"] == ExitCode.ENVIRONMENT
    assert open_checkpoint(run_dir / "checkpoints", None).state["step"] == 2
    train_toy(*overrides)
    assert (run_dir / "toy.safetensors").is_file()
    assert not (run_dir / writers.RESERVE_FILE).exists()


@pytest.mark.parametrize(("operation", "name"), [("write", "config.yaml"), ("reserve", ".reserve")])
def test_a_disk_that_refuses_what_a_run_begins_with_is_told_in_words(
    train_toy: Train, tmp_path: Path, operation: str, name: str
) -> None:
    with (
        pytest.raises(SystemSetupError, match="the disk"),
        atomic_files.observe_operations(refusing(operation, name, errno.EIO)),
    ):
        train_toy()
    assert json.loads((tmp_path / "runs" / "toy" / "exit.json").read_text())["code"] == ExitCode.ENVIRONMENT
    assert (train_toy() / "toy.safetensors").is_file()


def test_a_group_that_has_to_stop_leaves_a_lora_of_every_trial(sweep: Callable[..., Path], tmp_path: Path) -> None:
    words = ("{grid: {optimizer.lr: [1e-3, 2e-3]}}", "checkpoint={every_steps: 2, on_disk_full: stop}")
    with (
        pytest.raises(SystemSetupError, match="stopped at step 4: the disk took no checkpoint"),
        atomic_files.observe_operations(refusing("rename", "step-00000004", errno.EIO)),
    ):
        sweep(*words)
    trials = tmp_path / "runs" / "toy" / "trials"
    saved = [file.name for file in sorted(trials.glob("*/*-step00000004.safetensors"))]
    assert saved == [f"lr{lr}-seed42-step00000004.safetensors" for lr in ("1e-3", "2e-3")]


def test_tensorboards_disk_does_not_end_the_run(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = tensorboard.EventFileWriter.add_event

    def refuse(self: Any, event: Any) -> None:
        if event.HasField("summary"):
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(self, event)

    monkeypatch.setattr(tensorboard.EventFileWriter, "add_event", refuse)
    assert (train_toy("tracking.tensorboard=true") / "toy.safetensors").is_file()
    assert capsys.readouterr().out.count("TensorBoard's events end here") == 1


def test_rows_that_the_disk_refuses_wait(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "log", keep_bytes=0)
    log.append("one")
    with atomic_files.observe_operations(refusing("append", "log", errno.ENOSPC)):
        log.append("two")
        log.append("three")
        assert log.sync() == len("one\ntwo\nthree\n"), "as long as it will be: a log keeps nobody from a checkpoint"
    log.append("four")
    assert log.sync() == len("one\ntwo\nthree\nfour\n")
    log.close()
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree\nfour\n"


def test_the_older_checkpoint_of_a_step_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 3, value=3)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="could not be read back"):
        patch.setattr(checkpoint, "_fault", lambda _: "torn")
        save(tmp_path, 3, value=6)
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state["value"] == 3
    save(tmp_path, 3, value=9)
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state["value"] == 9


def test_damaged_checkpoints_are_no_fresh_start_the_second_time_either(tmp_path: Path) -> None:
    (save(tmp_path, 3) / "manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(SystemSetupError, match="no checkpoint of this run can be read"):
            newest_checkpoint(tmp_path)


def test_a_foreign_file_in_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "notes.safetensors").write_text("not ours")
    found, faults = newest_checkpoint(tmp_path)
    assert found is not None
    assert (faults, set(found.tensors())) == ([], {"adapter"})


def test_the_reserve_takes_its_room_and_gives_it_back(tmp_path: Path) -> None:
    atomic_files.reserve_space(tmp_path / "kept", 2**20)
    assert (tmp_path / "kept").stat().st_blocks * 512 >= 2**20
    for _ in range(2):
        atomic_files.remove_file(tmp_path / "kept")
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_a_real_full_disk(program: Callable[..., Any], toy_config: Path, tmp_path: Path) -> None:
    """A file system of 8 MiB that somebody else fills while the run trains: the LoRA is written all the same."""
    mount = tmp_path / "small"
    mount.mkdir()
    can_mount = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(mount)], check=False)
    if can_mount.returncode:
        pytest.skip("no user namespaces here")
    script = (
        "import sys; from pathlib import Path; from lora_trainer.training import writers\n"
        "from lora_trainer.cli.train import train\n"
        "mount, honest = Path(sys.argv[1]), writers.TrialWriter.row\n"
        "def row(self, step, *rest):\n"
        "    if step == 3:\n"
        "        try: (mount / 'other').write_bytes(bytes(2**27))\n"
        "        except OSError as error: print('full:', error.errno)\n"
        "    return honest(self, step, *rest)\n"
        "writers.TrialWriter.row = row\n"
        "train(Path(sys.argv[2]), sys.argv[3:])\n"
        "print('kept', sorted(f.name for f in mount.rglob('*.safetensors') if 'toy' in f.name))\n"
    )
    start = f'mount -t tmpfs -o size=8m tmpfs {mount} && exec {sys.executable} -c "$0" "$@"'
    overrides = [f"output_dir={mount}", f"data.cache_dir={tmp_path / 'cache'}", "checkpoint.every_steps=2"]
    run = program(["unshare", "-rm", "sh", "-c", start, script, str(mount), str(toy_config), *overrides])
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"full: {errno.ENOSPC}" in run.stdout
    assert "step 4: the disk took no checkpoint" in run.stdout
    assert "kept ['toy.safetensors']" in run.stdout
