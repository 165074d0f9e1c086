"""Six updates straight equal three, a stop, and three more: the same bytes, the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import stop_after

from lora_trainer.cli import train as train_command
from lora_trainer.config.optimizers import OPTIMIZERS, AdamW
from lora_trainer.errors import ConfigError, ExitCode, StoppedBySignal, SystemSetupError
from lora_trainer.schedules.registry import CLASSIC, SCHEDULES
from lora_trainer.tracking.metrics import TIMING_FIELDS, read_rows

SHOWN = ("sample={prompts: [x], num_inference_steps: 1, every_steps: 2}", "export.every_steps=2")
WATCHED = ("validation={fraction: 0.3, every_steps: 1, max_cost: 1.0}", "data.crop=random")
RICH = ("data.flip=true", "data.captions.dropout=0.3", "train.ema_decay=0.9", "train.gradient_accumulation_steps=2")


def outputs(run_dir: Path) -> dict[str, bytes]:
    """All LoRA files, all samples and the last state, by their path in the run directory."""
    last = max((run_dir / "checkpoints").iterdir())
    files = [*run_dir.glob("*.safetensors"), *run_dir.glob("diffusers/*"), *last.glob("*.safetensors")]
    files += run_dir.glob("samples/*.png")
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """All rows but for resumes and checkpoints, without the fields that tell the time."""
    kept = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") not in ("resume", "checkpoint")]
    return [{key: value for key, value in row.items() if key not in TIMING_FIELDS} for row in kept]


def assert_same_run_twice(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], stops: list[int]
) -> None:
    straight = train_toy(*overrides)
    straight = straight.rename(straight.with_name("straight"))
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(StoppedBySignal) as caught:
                train_toy(*overrides)
            assert caught.value.exit_code == ExitCode.STOPPED == 75
    resumed = train_toy(*overrides)
    assert len(outputs(straight)) >= 4  # two LoRA files, adapter and optimizer
    assert outputs(straight) == outputs(resumed)
    assert rows(straight) == rows(resumed)


@pytest.mark.quick
@pytest.mark.parametrize("stops", [[1], [3], [5], [2, 1, 2]])
def test_a_resume_is_byte_identical(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    assert_same_run_twice(train_toy, monkeypatch, RICH, stops)


def test_a_resume_after_every_update_of_twenty_is_byte_identical(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nineteen stops: LR, losses, gradient norms and weights at every k are those of the run without a stop."""
    curve = "lr_scheduler={type: cosine_with_restarts, num_cycles: 3, warmup_steps: 2}"
    assert_same_run_twice(train_toy, monkeypatch, ("train.max_steps=20", curve), [1] * 19)


@pytest.mark.parametrize("overrides", [SHOWN, (*SHOWN, *RICH, *WATCHED)], ids=["plain", "with everything"])
def test_a_stop_where_samples_and_exports_are_due_owes_them_to_the_resume(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    assert_same_run_twice(train_toy, monkeypatch, overrides, [2, 1, 1])


def test_a_resume_with_validation_and_plateau_is_byte_identical(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plateau = "lr_scheduler={type: plateau, patience: 1, threshold_se: 100, factor: 0.5}"
    assert_same_run_twice(train_toy, monkeypatch, (*RICH, *WATCHED, plateau), [2, 2])


OPTIMIZER_OVERRIDES = {
    "adafactor": ("optimizer={type: adafactor, lr: 1e-2, scale_parameter: true, beta1: 0.9}",),
    "prodigy": ("optimizer={type: prodigy}",),
    "schedule_free_adamw": (
        "optimizer={type: schedule_free_adamw, warmup_steps: 2}",
        "lr_scheduler={type: constant}",
        "sample={prompts: [x], num_inference_steps: 1, every_steps: 2}",
    ),
}


@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZERS) - {AdamW.model_fields["type"].default}))
def test_every_optimizer_resumes(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
    overrides = OPTIMIZER_OVERRIDES.get(optimizer, (f"optimizer={{type: {optimizer}, lr: 1e-3}}",))
    assert_same_run_twice(train_toy, monkeypatch, overrides, [3])


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - set(CLASSIC)))
def test_every_schedule_resumes(train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options = json.dumps({"type": name, **SCHEDULES[name].example})
    watched = ["validation={fraction: 0.3, every_steps: 2, max_cost: 1.0}"] if name == "plateau" else []
    assert_same_run_twice(train_toy, monkeypatch, (f"lr_scheduler={options}", "train.max_steps=10", *watched), [3])


def test_two_runs_of_one_config_are_byte_identical(train_toy: Callable[..., Path]) -> None:
    one = train_toy(*RICH)
    one = one.rename(one.with_name("one"))
    two = train_toy(*RICH)
    assert (one / "toy.safetensors").read_bytes() == (two / "toy.safetensors").read_bytes()


def test_a_finished_run_started_again_changes_nothing(
    train_toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train_toy()
    before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*.safetensors")}
    log = (run_dir / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    train_toy()
    assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*.safetensors")} == before
    assert (run_dir / "metrics.jsonl").read_bytes() == log
    assert "toy.safetensors" in capsys.readouterr().out
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0


@pytest.mark.parametrize(
    "change", ["optimizer.lr=2e-3", "train.max_steps=8", "lr_scheduler={type: constant}", "seed=1"]
)
def test_another_identity_is_refused_with_the_difference(train_toy: Callable[..., Path], change: str) -> None:
    run_dir = train_toy()
    before = (run_dir / "toy.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="other settings") as caught:
        train_toy(change)
    assert change.partition("=")[0] in str(caught.value)
    assert (run_dir / "toy.safetensors").read_bytes() == before


def test_changed_data_is_another_identity(train_toy: Callable[..., Path], tmp_path: Path) -> None:
    from toys import write_images

    images = write_images(tmp_path / "own")
    train_toy(f"data.dir={images}")
    (images / "00.txt").write_text("something else")
    with pytest.raises(ConfigError, match="data content"):
        train_toy(f"data.dir={images}")


def test_what_is_observed_may_change(train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(StoppedBySignal):
            train_toy()
    run_dir = train_toy("sample={prompts: [x], num_inference_steps: 2}", "export.dtype=fp32")
    assert (run_dir / "samples" / "grid.png").is_file()


def test_fresh_keeps_the_old_run_aside(train_toy: Callable[..., Path], toy_config: Path) -> None:
    run_dir = train_toy()
    old = (run_dir / "toy.safetensors").read_bytes()
    train_command.train(toy_config, ["name=toy", "seed=1"], fresh=True)
    assert (run_dir.with_name("toy.before-1") / "toy.safetensors").read_bytes() == old
    assert (run_dir / "toy.safetensors").read_bytes() != old


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    straight = train_toy("checkpoint.every_steps=2")
    straight = straight.rename(straight.with_name("straight"))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(StoppedBySignal):
            train_toy("checkpoint.every_steps=2")
    checkpoints = tmp_path / "runs" / "toy" / "checkpoints"
    newest = max(checkpoints.iterdir())
    assert newest.name == "step-00000005"
    raw = bytearray((newest / "adapter.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (newest / "adapter.safetensors").write_bytes(raw)
    run_dir = train_toy("checkpoint.every_steps=2")
    assert "step-00000005 is damaged" in capsys.readouterr().out
    assert (checkpoints / "step-00000005.corrupt").is_dir()
    assert (run_dir / "toy.safetensors").read_bytes() == (straight / "toy.safetensors").read_bytes()


def test_no_silent_fresh_start_when_every_checkpoint_is_damaged(train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy("checkpoint.every_steps=3")
    for checkpoint in (run_dir / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    (run_dir / "toy.safetensors").unlink()
    with pytest.raises(SystemSetupError, match="no checkpoint of this run can be read"):
        train_toy("checkpoint.every_steps=3")


def test_a_damaged_lora_of_a_finished_run_is_written_again(train_toy: Callable[..., Path]) -> None:
    lora = train_toy() / "toy.safetensors"
    whole = lora.read_bytes()
    lora.write_bytes(whole[:-100])
    train_toy()
    assert lora.read_bytes() == whole
