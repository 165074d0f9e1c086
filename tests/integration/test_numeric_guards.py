"""Numbers that are not finite: never applied, never saved, named, and no reason to lose step with others."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import before_updates, spoil_gradients, spoil_losses

from lora_trainer.errors import DataError, ExitCode, NumericStop
from lora_trainer.evidence.diagnosis.log import read_run as read_log
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.report.runs import read_run
from lora_trainer.storage.checkpoint import Checkpoint, open_checkpoint
from lora_trainer.tracking.metrics import read_rows, step_rows
from lora_trainer.training.optimizer_step import OptimizerStep
from lora_trainer.training.trial import Trial

Train = Callable[..., Path]
SAVED = ("train.ema_decay=0.9", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
WATCHED = "validation={fraction: 0.3, every_steps: 1, max_cost: 1.0}"


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == name]


def saved(run_dir: Path, step: int | None = None) -> Checkpoint:
    return open_checkpoint(run_dir / "checkpoints", step)


def assert_equal(ours: dict[str, dict[str, torch.Tensor]], theirs: dict[str, dict[str, torch.Tensor]]) -> None:
    assert ours.keys() == theirs.keys()
    for part, tensors in ours.items():
        assert tensors.keys() == theirs[part].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[part][name]), (part, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_update_changes_nothing_and_the_next_is_the_one_after_it(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Update 2 of 6 has a gradient that is not finite: LR, images, noise and dates of the others stay theirs."""
    straight = step_rows(train_toy(*SAVED, WATCHED, name="straight") / "metrics.jsonl")
    with monkeypatch.context() as patch:
        spoil_gradients(patch, [2], value=value)
        run_dir = train_toy(*SAVED, WATCHED, "export.every_steps=3")
    (skip,) = events(run_dir, "skip")
    assert (skip["step"], skip["trial"], skip["reason"], len(skip["files"])) == (3, "toy", "gradient", 2)
    rows = step_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6]
    for row in rows:
        theirs = straight[row["step"] - 1]
        assert [row[key] for key in ("lr", "draws", "epoch")] == [theirs[key] for key in ("lr", "draws", "epoch")]

    assert_equal(saved(run_dir, 3).tensors(), saved(run_dir, 2).tensors())
    before, after = (saved(run_dir, step).state["trials"]["toy"] for step in (2, 3))
    assert after["skips"] == {"total": 1, "faults_in_a_row": 1, "overflows_in_a_row": 0}
    assert after["optimizer"] == before["optimizer"]
    assert [row["step"] for row in events(run_dir, "checkpoint")] == [1, 2, 3, 4, 5, 6]
    probes = {row["step"]: row["items"] for row in events(run_dir, "validation") if row["probe"] == "held_out"}
    assert sorted(probes) == list(range(7))
    assert probes[3] == probes[2] != probes[4]
    assert (run_dir / "toy-step00000003.safetensors").is_file()
    counts = [tensor for name, tensor in saved(run_dir).tensors()["optimizer"].items() if name.endswith("/step")]
    assert {float(count) for count in counts} == {5.0}
    assert saved(run_dir).state["trials"]["toy"]["skips"] == {
        "total": 1,
        "faults_in_a_row": 0,
        "overflows_in_a_row": 0,
    }

    honest = Trial.apply_update
    monkeypatch.setattr(Trial, "apply_update", lambda self, k: {"unet": 0.0} if k == 2 else honest(self, k))
    left_out = train_toy(*SAVED, WATCHED, name="left-out")
    names = ("adapter", "optimizer", "average")
    ours, theirs = (saved(folder).tensors() for folder in (run_dir, left_out))
    for part in names:
        for name, tensor in ours[part].items():
            assert torch.equal(tensor, theirs[part][name.replace("toy/", "left-out/")]), name


def test_a_resume_after_a_skipped_update_is_byte_identical(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_resume import assert_same_run_twice

    spoil_gradients(monkeypatch, [2])
    assert_same_run_twice(train_toy, monkeypatch, (*SAVED, WATCHED), [3, 1])


class TestThreeInARow:
    """Updates 2, 3 and 4 of 8 have gradients that are not finite."""

    LENGTH = ("train.max_steps=8", *SAVED)
    CHANGED = ("optimizer.lr=2e-4", "resume.allow_changes=[optimizer.lr]")

    @pytest.fixture
    def stopped(self, train_toy: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        with monkeypatch.context() as patch:
            spoil_gradients(patch, [2, 3, 4])
            with pytest.raises(NumericStop) as caught:
                train_toy(*self.LENGTH)
        assert caught.value.exit_code == ExitCode.NUMERIC == 6
        return tmp_path / "runs" / "toy"

    def test_they_end_the_run_with_its_last_good_state_saved(self, stopped: Path) -> None:
        assert json.loads((stopped / "exit.json").read_text())["code"] == 6
        assert [skip["step"] for skip in events(stopped, "skip")] == [3, 4, 5]
        (failed,) = events(stopped, "failed")
        assert failed["step"] == 5
        assert "its gradient was not finite in 3 updates in a row; images " in failed["reason"]
        assert saved(stopped).state["step"] == 5
        assert_equal(saved(stopped).tensors(), saved(stopped, 2).tensors())
        assert not list(stopped.glob("*.safetensors"))

    @pytest.mark.parametrize("allowed", [(), ("resume.allow_changes=[optimizer.lr]",)])
    def test_the_same_command_says_so_again_and_changes_nothing(
        self, stopped: Path, train_toy: Train, allowed: tuple[str, ...]
    ) -> None:
        log = (stopped / "metrics.jsonl").read_bytes()
        with pytest.raises(
            NumericStop, match="after step 5, which is saved: its gradient was not finite in 3"
        ) as again:
            train_toy(*self.LENGTH, *allowed)
        assert again.value.exit_code == 6
        assert "resume.allow_changes=[optimizer.lr]" in str(again.value.problems[0].fix)
        assert (stopped / "metrics.jsonl").read_bytes() == log
        assert not list(stopped.glob("*.safetensors"))

    def test_a_changed_setting_goes_on_after_the_last_skipped_update(self, stopped: Path, train_toy: Train) -> None:
        straight = step_rows(train_toy("train.max_steps=8", name="straight") / "metrics.jsonl")
        run_dir = train_toy(*self.LENGTH, *self.CHANGED)
        rows = step_rows(run_dir / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 6, 7, 8]
        for row in rows[2:]:
            theirs = straight[row["step"] - 1]
            assert row["lr"] == pytest.approx(theirs["lr"] / 5)  # 2e-4 in place of 1e-3
            assert (row["draws"], row["epoch"]) == (theirs["draws"], theirs["epoch"])
        assert (run_dir / "toy.safetensors").is_file()
        assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
        assert saved(run_dir).state["trials"]["toy"]["ending"] is None
        assert (read_run(run_dir).failure, read_run(run_dir).status) == (None, "finished")
        assert "failed at step" not in (run_dir / "report.html").read_text()
        assert read_log(run_dir)[0].failure is None
        train_toy(*self.LENGTH, *self.CHANGED)  # finished: nothing to do

    def test_a_change_that_does_not_help_stops_it_again(
        self, stopped: Path, train_toy: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil_gradients(monkeypatch, range(5, 8))
        with pytest.raises(NumericStop, match="after step 8"):
            train_toy(*self.LENGTH, *self.CHANGED)
        assert_equal(saved(stopped).tensors(), saved(stopped, 5).tensors())


def test_a_run_whose_last_update_was_skipped_is_finished(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_gradients(monkeypatch, [5])
    run_dir = train_toy(WATCHED)
    record = read_run(run_dir)
    assert (record.step, record.status, record.final["step"] if record.final else None) == (6, "finished", 6)
    assert (run_dir / "toy.safetensors").is_file()


def test_two_in_a_row_twice_are_no_reason_to_stop(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_gradients(monkeypatch, [0, 1, 3, 4])
    assert [row["step"] for row in step_rows(train_toy() / "metrics.jsonl")] == [3, 6]


@pytest.mark.parametrize("trials_per_pass", [1, 3])
def test_a_failed_trial_of_a_sweep_leaves_the_others_bytes_untouched(
    sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, trials_per_pass: int
) -> None:
    section = f"{{grid: {{optimizer.lr: [1e-3, 2e-3, 3e-3]}}, trials_per_pass: {trials_per_pass}}}"
    healthy = sweep(section, name="healthy")
    spoil_gradients(monkeypatch, [1, 2, 3], trial="lr2e-3-seed42")
    spoilt = sweep(section, name="spoilt")
    trials = {trial["name"]: trial for trial in json.loads((spoilt / "sweep.json").read_text())["trials"]}
    assert {name: trial["status"] for name, trial in trials.items()} == {
        "lr1e-3-seed42": "finished",
        "lr2e-3-seed42": "failed",
        "lr3e-3-seed42": "finished",
    }
    assert (trials["lr2e-3-seed42"]["step"], trials["lr2e-3-seed42"]["final"]) == (4, None)
    for name in ("lr1e-3-seed42", "lr3e-3-seed42"):
        ours, theirs = (folder / "trials" / name / f"{name}.safetensors" for folder in (spoilt, healthy))
        assert ours.read_bytes() == theirs.read_bytes()
        assert [row["step"] for row in step_rows(ours.with_name("metrics.jsonl"))] == list(range(1, 7))
    assert not (spoilt / "trials" / "lr2e-3-seed42" / "lr2e-3-seed42.safetensors").exists()
    done = list(spoilt.rglob("*.safetensors"))
    sweep(section, name="spoilt")  # finished: the failed one is not tried again
    assert list(spoilt.rglob("*.safetensors")) == done


def test_a_sweep_of_which_no_trial_is_left_exits_as_a_run_does(
    sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil_gradients(monkeypatch, [1, 2, 3])
    for _ in ("trained", "finished before"):
        with pytest.raises(NumericStop, match="no trial came to its end"):
            sweep("{seeds: [1]}")
        assert json.loads((tmp_path / "runs" / "toy" / "exit.json").read_text())["code"] == 6
        assert (tmp_path / "runs" / "toy" / "report.html").is_file()


def test_a_skipped_update_of_one_trial_is_no_skip_of_the_others(
    sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_gradients(monkeypatch, [2], trial="lr1e-3-seed42")
    done = sweep("{grid: {optimizer.lr: [1e-3, 2e-3]}, trials_per_pass: 2}")
    rows = {folder.name: step_rows(folder / "metrics.jsonl") for folder in (done / "trials").iterdir()}
    assert [row["step"] for row in rows["lr1e-3-seed42"]] == [1, 2, 4, 5, 6]
    assert [row["step"] for row in rows["lr2e-3-seed42"]] == [1, 2, 3, 4, 5, 6]
    draws = {name: {row["step"]: row["draws"] for row in own} for name, own in rows.items()}
    assert draws["lr1e-3-seed42"].items() <= draws["lr2e-3-seed42"].items()
    assert (done / "trials" / "lr1e-3-seed42" / "lr1e-3-seed42.safetensors").is_file()


FP16 = "train.precision=fp16"
TOO_LARGE = 2.0**40


def test_the_fp16_scale_is_settled_before_the_first_update(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale far too large costs no update, whatever it takes to come down."""
    plain = train_toy(FP16, name="plain")
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=TOO_LARGE))
    run_dir = train_toy(FP16, name="settled")
    assert not events(run_dir, "skip")
    ours, theirs = (step_rows(folder / "metrics.jsonl") for folder in (run_dir, plain))
    for key in ("step", "lr", "draws", "epoch"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]
    scale = saved(run_dir).state["trials"]["settled"]["scaler"]["scale"]
    assert 1 <= scale <= TOO_LARGE / 2


def test_settling_halves_until_the_gradients_are_finite_and_applies_nothing(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[list[float]] = []

    def look(step: OptimizerStep, k: int) -> None:
        scales.append([trial.scaler.get_scale() for trial in step.trials])
        if k == 0:
            (trial,) = step.trials
            assert not trial.optimizer.state
            assert not trial.skips.total
            assert all(parameter.grad is None for parameter in trial.parameters.values())
            assert all(not p.any() for name, p in trial.parameters.items() if "lora_B" in name)

    before_updates(monkeypatch, look)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=TOO_LARGE))
    train_toy(FP16)
    assert scales[0][0] < TOO_LARGE
    assert {scale[0] for scale in scales} == {scales[0][0]}


def test_an_fp16_overflow_skips_its_update_and_halves_the_scale(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = step_rows(train_toy(FP16, name="straight") / "metrics.jsonl")
    spoil_gradients(monkeypatch, [1, 2, 3, 4], value=float("inf"))  # more in a row than of other numbers may be
    run_dir = train_toy(FP16, *SAVED)
    assert [(skip["step"], skip["reason"]) for skip in events(run_dir, "skip")] == [
        (step, "fp16 overflow") for step in (2, 3, 4, 5)
    ]
    rows = step_rows(run_dir / "metrics.jsonl")
    assert [(row["step"], row["lr"], row["draws"]) for row in rows] == [
        (row["step"], row["lr"], row["draws"]) for row in (straight[0], straight[5])
    ]
    scales = [saved(run_dir, step).state["trials"]["toy"]["scaler"]["scale"] for step in range(1, 7)]
    assert scales == [scales[0] / 2**halvings for halvings in (0, 1, 2, 3, 4, 4)]
    assert_equal(saved(run_dir, 5).tensors(), saved(run_dir, 1).tensors())


def test_overflows_without_end_stop_the_run(train_toy: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoil_gradients(monkeypatch, range(1, 100), value=float("inf"))
    with pytest.raises(NumericStop, match="its fp16 overflow was not finite in 30 updates in a row"):
        train_toy(FP16, "train.max_steps=40")
    assert saved(tmp_path / "runs" / "toy").state["step"] == 31


@pytest.mark.parametrize("trials_per_pass", [1, 2])
def test_one_trials_overflow_in_fp16_leaves_the_others_bytes_untouched(
    sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, trials_per_pass: int
) -> None:
    section = f"{{grid: {{optimizer.lr: [1e-3, 3e-3]}}, trials_per_pass: {trials_per_pass}}}"
    healthy = sweep(section, FP16, name="healthy")
    spoil_gradients(monkeypatch, [2, 4], trial="lr1e-3-seed42", value=float("inf"))
    spoilt = sweep(section, FP16, name="spoilt")
    one, other = ("lr1e-3-seed42", "lr3e-3-seed42")
    path = Path("trials") / other / f"{other}.safetensors"
    assert (spoilt / path).read_bytes() == (healthy / path).read_bytes()
    assert [skip["step"] for skip in events(spoilt / "trials" / one, "skip")] == [3, 5]
    assert not events(spoilt / "trials" / other, "skip")
    scales = {
        folder.name: {name: own["scaler"]["scale"] for name, own in saved(group).state["trials"].items()}
        for folder in (healthy, spoilt)
        for group in [folder / "groups" / "seed42"]
    }
    assert scales["spoilt"] == {one: scales["healthy"][one] / 4, other: scales["healthy"][other]}


def test_a_resume_in_fp16_restores_each_trials_scale(
    sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from faults import stop_after

    section = "{grid: {optimizer.lr: [1e-3, 3e-3]}, trials_per_pass: 2}"
    spoil_gradients(monkeypatch, [1], trial="lr3e-3-seed42", value=float("inf"))
    straight = sweep(section, FP16, name="straight")
    for stop in (2, 2):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(Exception, match="stopped as asked"):
                sweep(section, FP16)
    resumed = sweep(section, FP16)
    groups = [folder / "groups" / "seed42" for folder in (straight, resumed)]
    ours, theirs = ({name: own["scaler"] for name, own in saved(g).state["trials"].items()} for g in groups)
    assert ours == theirs
    assert ours["lr3e-3-seed42"]["scale"] == ours["lr1e-3-seed42"]["scale"] / 2
    for name in ours:
        path = Path("trials") / name / f"{name}.safetensors"
        assert (resumed / path).read_bytes() == (straight / path).read_bytes()


@pytest.mark.parametrize("part", ["adapter", "optimizer", "average"])
def test_no_part_of_the_state_is_saved_with_a_nan(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str
) -> None:
    def spoil(step: OptimizerStep, k: int) -> None:
        if k == 3:
            parts, _ = step.trials[0].state()
            next(t for name, t in parts[part].items() if t.numel() > 1).view(-1)[0] = float("nan")

    before_updates(monkeypatch, spoil)
    with pytest.raises(NumericStop):
        train_toy(*SAVED)
    newest = saved(tmp_path / "runs" / "toy")
    assert newest.state["step"] == 3
    for tensors in newest.tensors().values():
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())


def test_a_prompt_whose_embedding_is_not_finite_is_named(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = StableDiffusion.encode_prompt

    def spoilt(self: StableDiffusion, encoders: Any, prompt: str) -> dict[str, torch.Tensor]:
        factor = float("nan") if prompt == "picture 3" else 1
        return {name: values * factor for name, values in honest(self, encoders, prompt).items()}

    monkeypatch.setattr(StableDiffusion, "encode_prompt", spoilt)
    with pytest.raises(DataError, match="'picture 3': the prompt's embedding is not finite"):
        train_toy(f"data.cache_dir={tmp_path / 'own-cache'}")


def test_a_loss_that_is_not_finite_is_skipped_and_named(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_losses(monkeypatch, [2])
    run_dir = train_toy("tracking.base_loss_every=null")
    assert [row["step"] for row in step_rows(run_dir / "metrics.jsonl")] == [1, 2, 4, 5, 6]
    (skip,) = events(run_dir, "skip")
    assert (skip["step"], skip["reason"], len(skip["files"])) == (3, "loss", 2)


def test_an_early_version_s_second_counter_is_gone_from_the_log(train_toy: Train) -> None:
    rows = list(read_rows(train_toy() / "metrics.jsonl"))
    assert not any("attempt" in row for row in rows)
