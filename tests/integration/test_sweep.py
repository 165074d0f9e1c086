"""Sweeps from the configuration to the files: equal to solo runs, resumed by bytes, extended, forked."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import stop_after
from toys import WATCHED
from worlds import run_in_a_process, run_in_world

from lora_trainer.cli import train as train_command
from lora_trainer.config.trials import load_sweep
from lora_trainer.errors import ConfigError, StoppedBySignal
from lora_trainer.experiments.sweep import record
from lora_trainer.experiments.sweep.derived import plan_confirmation
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.metrics import TIMING_FIELDS, read_rows, step_rows
from lora_trainer.training import fit as fit_module
from lora_trainer.training.trial import Trial
from lora_trainer.training.validation import Validator

Sweep = Callable[..., Path]


def results(sweep_dir: Path) -> dict[str, Any]:
    content = json.loads((sweep_dir / "sweep.json").read_text())
    return {trial["name"]: trial for trial in content["trials"]}


def lora_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def log(folder: Path) -> list[dict[str, Any]]:
    """All rows but for resumes and checkpoints, without the fields that tell the time or the trial."""
    kept = [row for row in read_rows(folder / "metrics.jsonl") if row.get("event") not in ("resume", "checkpoint")]
    return [{key: value for key, value in row.items() if key not in (*TIMING_FIELDS, "trial")} for row in kept]


GRID = "{grid: {lr_scheduler: [{type: constant}, {type: cosine, warmup_steps: 2}], optimizer.lr: [1e-3, 3e-3]}"


@pytest.mark.quick
def test_a_sweep_leaves_what_solo_runs_leave_to_the_byte(sweep: Sweep, tmp_path: Path) -> None:
    grid = "{lr_scheduler: [{type: constant}, {type: cosine, warmup_steps: 2}], optimizer.lr: [3e-3]}"
    done = sweep(f"{{grid: {grid}, seeds: [1, 2], trials_per_pass: 1}}")
    trials = results(done)
    assert len(trials) == 4
    for name in ("constant-lr3e-3-seed1", "cosine-warmup_steps2-lr3e-3-seed2"):
        trial, folder = trials[name], done / "trials" / name
        train_command.train(folder / "config.yaml", [f"output_dir={tmp_path / 'solo'}"])
        solo = tmp_path / "solo" / name
        ours = lora_files(folder)
        theirs = {k: v for k, v in lora_files(solo).items() if not k.startswith("checkpoints")}
        assert ours == theirs
        assert log(folder) == log(solo)
        probes = [row for row in log(solo) if row.get("event") == "validation" and row["probe"] == "held_out"]
        assert trial["status"] == "finished"
        assert trial["final"]["relative"] == probes[-1]["relative"]
        assert trial["final"]["items"] == probes[-1]["items"]
        assert trial["best"]["relative"] == min(row["relative"] for row in probes[1:])
    assert trials["cosine-warmup_steps2-lr3e-3-seed2"] | {"final": None, "best": None} == {
        "name": "cosine-warmup_steps2-lr3e-3-seed2",
        "arm": "cosine-warmup_steps2-lr3e-3",
        "setting": "cosine-warmup_steps2",
        "seed": 2,
        "group": "seed2",
        "folder": "trials/cosine-warmup_steps2-lr3e-3-seed2",
        "overrides": {"lr_scheduler": {"type": "cosine", "warmup_steps": 2}, "optimizer.lr": 0.003},
        "schedule": "cosine",
        "peak_lr": 0.003,
        "lr_budget": pytest.approx(0.5, abs=0.1),
        "num_updates": 6,
        "status": "finished",
        "step": 6,
        "reason": None,
        "final": None,
        "best": None,
        "shares_until": None,
    }


def test_packed_trials_see_equal_batches_and_come_close_to_solo_runs(sweep: Sweep) -> None:
    alone = sweep(f"{GRID}, trials_per_pass: 1}}", name="alone")
    packed = sweep(f"{GRID}, trials_per_pass: auto}}", name="packed")
    draws = {tuple(row["draws"] for row in step_rows(f)) for f in packed.glob("trials/*/metrics.jsonl")}
    assert len(draws) == 1
    for name, trial in results(packed).items():
        assert trial["final"]["relative"] == pytest.approx(results(alone)[name]["final"]["relative"], rel=1e-4)
        assert lora_files(packed / "trials" / name).keys() == lora_files(alone / "trials" / name).keys()
    assert len({trial["final"]["relative"] for trial in results(packed).values()}) == 4


def test_a_stopped_sweep_resumes_to_the_byte_and_repeats_no_group(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = "{grid: {optimizer.lr: [1e-3, 2e-3, 3e-3]}, seeds: [1, 2], trials_per_pass: 2}"
    straight = sweep(section, "train.ema_decay=0.9", name="straight")
    for stop in (4, 3, 2):  # in the first group, in its second start and on into the second group, and there
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(StoppedBySignal):
                sweep(section, "train.ema_decay=0.9")
    resumed = sweep(section, "train.ema_decay=0.9")
    for name in results(straight):
        ours, theirs = resumed / "trials" / name, straight / "trials" / name
        assert lora_files(ours) == lora_files(theirs)
        assert log(ours) == log(theirs)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished trial was trained again")

    monkeypatch.setattr(fit_module, "train_loop", never)
    before = lora_files(resumed)
    sweep(section, "train.ema_decay=0.9")
    assert lora_files(resumed) == before


def test_trials_and_seeds_added_later_leave_the_finished_ones_alone(sweep: Sweep) -> None:
    first = sweep("{grid: {optimizer.lr: [1e-3]}, seeds: [1]}")
    before = {file: file.stat().st_mtime_ns for file in first.glob("trials/**/*.safetensors")}
    sweep("{grid: {optimizer.lr: [1e-3, 2e-3]}, trials: {wide: {adapter.rank: 8}}, seeds: [1, 2]}")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    content = json.loads((first / "sweep.json").read_text())
    assert [(group["name"], group["status"], len(group["trials"])) for group in content["groups"]] == [
        ("seed1", "finished", 1),
        ("seed1-2", "finished", 2),
        ("seed2", "finished", 3),
    ]
    assert {trial["status"] for trial in content["trials"]} == {"finished"}
    late = step_rows(first / "trials" / "lr2e-3-seed1" / "metrics.jsonl")
    early = step_rows(first / "trials" / "lr1e-3-seed1" / "metrics.jsonl")
    assert [row["draws"] for row in late] == [row["draws"] for row in early]


LONGER = ("train.max_steps=9", "resume.allow_changes=[train.max_steps]")


def test_steps_added_later_go_on_where_the_trials_ended(sweep: Sweep) -> None:
    """Curves that do not know their end equal the long run to the byte, although they ended and forked before."""
    slow = "{lr_scheduler: {type: constant_with_warmup, warmup_steps: 3}}"
    section = f"{{trials: {{slow: {slow}, slower: {slow.replace('3', '4')}, flat: {{}}}}, trials_per_pass: 1}}"
    constant = "lr_scheduler={type: constant}"
    straight = sweep(section, constant, "train.max_steps=9", name="straight")
    first = sweep(section, constant)
    assert {trial["step"] for trial in results(first).values()} == {6}
    longer = sweep(section, constant, *LONGER)
    assert {(t["step"], t["num_updates"], t["status"]) for t in results(longer).values()} == {(9, 9, "finished")}
    for name in results(straight):
        assert lora_files(longer / "trials" / name) == lora_files(straight / "trials" / name)
        ours, theirs = (step_rows(folder / "trials" / name / "metrics.jsonl") for folder in (longer, straight))
        assert [(row["step"], row["loss"], row["lr"]) for row in ours] == [
            (row["step"], row["loss"], row["lr"]) for row in theirs
        ]


def test_steps_added_under_a_curve_that_ended_at_zero_need_a_stretch(sweep: Sweep) -> None:
    section = "{grid: {lr_scheduler: [{type: cosine}, {type: constant}]}}"
    sweep(section)
    with pytest.raises(ConfigError, match=r"accept the change with 'resume.allow_changes=\[train.max_steps\]'"):
        sweep(section, "train.max_steps=9")
    with pytest.raises(ConfigError, match="ends at 0 after 6 updates"):
        sweep(section, *LONGER)
    longer = sweep(section, *LONGER, "resume.schedule=stretch")
    lrs = [row["lr"] for row in step_rows(longer / "trials" / "cosine-seed42" / "metrics.jsonl")]
    assert lrs[5] < lrs[6] < lrs[0]
    assert len(lrs) == 9


def test_another_setting_under_the_same_name_is_refused(sweep: Sweep) -> None:
    sweep("{trials: {a: {optimizer.lr: 1e-3}}}")
    with pytest.raises(ConfigError, match="`a-seed42` began with other settings") as caught:
        sweep("{trials: {a: {optimizer.lr: 2e-3}}}")
    assert "optimizer.lr: 0.001 -> 0.002" in str(caught.value)


def test_settings_of_the_batch_make_groups_of_their_own(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    section = "{trials: {small: {train.batch_size: 1}, base: {}, wide: {adapter.rank: 8}}}"
    sweep(section, dry_run=True)
    said = capsys.readouterr().out
    assert re.search(r"group seed42 +1 trial x", said)
    assert re.search(r"group seed42-2 +2 trials x", said)
    assert "train.batch_size: 1 -> 2" in said


WSD = "{type: warmup_stable_decay, warmup_steps: 1, decay_steps: %d}"


def test_a_fork_is_bitwise_the_whole_run(sweep: Sweep, tmp_path: Path) -> None:
    """Three cooldowns from one plateau, and a trial apart, against runs of their own."""
    cooldowns = ", ".join(f"d{length}: {{lr_scheduler: {WSD % length}}}" for length in (1, 2, 4))
    section = f"{{trials: {{{cooldowns}, other: {{optimizer.lr: 2e-3}}}}, trials_per_pass: 1}}"
    done = sweep(section, "train.ema_decay=0.9")
    shared = {name: trial["shares_until"] for name, trial in results(done).items()}
    assert shared == {
        "d1-seed42": None,
        "d2-seed42": {"trunk": "d1-seed42", "step": 5},
        "d4-seed42": {"trunk": "d1-seed42", "step": 3},
        "other-seed42": {"trunk": "d1-seed42", "step": 2},  # half of twice the LR in its warm-up
    }
    for name in shared:
        folder = done / "trials" / name
        train_command.train(folder / "config.yaml", [f"output_dir={tmp_path / 'solo'}"])
        solo = tmp_path / "solo" / name
        assert lora_files(folder) == {k: v for k, v in lora_files(solo).items() if not k.startswith("checkpoints")}
        assert log(folder) == log(solo)


def test_a_fork_resumes_to_the_byte(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    cooldowns = ", ".join(f"d{length}: {{lr_scheduler: {WSD % length}}}" for length in (1, 2, 4))
    section = f"{{trials: {{{cooldowns}}}, trials_per_pass: 2}}"
    straight = sweep(section, name="straight")
    for stop in (2, 1, 1, 1):  # before, at and after the forks
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(StoppedBySignal):
                sweep(section)
    resumed = sweep(section)
    for name in results(straight):
        assert lora_files(resumed / "trials" / name) == lora_files(straight / "trials" / name)


def test_a_failing_trial_is_marked_and_the_others_come_to_their_end(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = sweep("{grid: {optimizer.lr: [1e-3, 2e-3]}, trials_per_pass: 2}", name="healthy")
    honest = Trial.clip

    def clip(self: Trial) -> Any:
        norm = honest(self)
        return (
            norm * float("nan") if self.name == "lr2e-3-seed42" and self.optimizer.state else norm
        )  # after one update

    monkeypatch.setattr(Trial, "clip", clip)
    done = sweep("{grid: {optimizer.lr: [1e-3, 2e-3]}, trials_per_pass: 2}")
    failed, other = results(done)["lr2e-3-seed42"], results(done)["lr1e-3-seed42"]
    assert (failed["status"], failed["step"], failed["final"]) == ("failed", 4, None)
    assert failed["reason"].startswith("its gradient was not finite in 3 updates in a row; images 0")
    rows = list(read_rows(done / "trials" / "lr2e-3-seed42" / "metrics.jsonl"))
    assert [row["step"] for row in rows if "event" not in row] == [1]
    assert [(row["step"], row["reason"]) for row in rows if row.get("event") == "skip"] == [
        (2, "gradient"),
        (3, "gradient"),
        (4, "gradient"),
    ]
    assert other["status"] == "finished"
    assert not (done / "trials" / "lr2e-3-seed42" / "lr2e-3-seed42.safetensors").exists()
    own = Path("trials") / "lr1e-3-seed42"
    assert lora_files(done / own) == lora_files(healthy / own)
    sweep("{grid: {optimizer.lr: [1e-3, 2e-3]}, trials_per_pass: 2}")  # nothing is left to do
    assert "lr2e-3-seed42" in capsys.readouterr().out


def test_a_diverged_trial_is_stopped_where_that_was_asked(sweep: Sweep) -> None:
    trials = "{wild: {optimizer.lr: 0.9, adapter.targets: [conv_out]}, tame: {}}"
    done = sweep(f"{{trials: {trials}, prune: {{diverged: 1.05}}}}")
    wild, tame = results(done)["wild-seed42"], results(done)["tame-seed42"]
    assert (wild["status"], wild["step"]) == ("stopped", 3)
    assert wild["reason"].startswith("sweep.prune.diverged: held-out loss")
    assert tame["status"] == "finished"


def test_a_probe_that_is_not_finite_breaks_no_record(
    sweep: Sweep, toy_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest, seen = Validator.measure, list[int]()

    def measure(self: Validator, weights: Any) -> Any:
        """NaN for the first trial always; infinite for the second at its first probe only."""
        readings = honest(self, weights)
        seen.append(len(readings))
        broken = [np.nan, np.inf] if len(seen) == 1 else [np.nan]
        for of_trial, value in zip(readings.values(), broken, strict=False):
            own = of_trial["held_out"]
            of_trial["held_out"] = replace(own, losses_NS=own.losses_NS * value)
        return readings

    monkeypatch.setattr(Validator, "measure", measure)
    arms = "lost: {lr_scheduler: {type: plateau, patience: 1}}, back: {lr_scheduler: {type: constant}}, sound: {}"
    section = f"{{trials: {{{arms}}}, trials_per_pass: 3}}"
    done = sweep(section, "checkpoint.every_steps=3")
    assert seen == [3, 3]
    lost, back, sound = results(done).values()
    reason = "the held-out loss at step 6 is nan"
    assert (lost["status"], lost["step"], lost["reason"]) == ("failed", 6, reason)
    assert lost["final"] is lost["best"] is None
    assert (back["status"], back["best"]) == ("finished", back["final"])
    assert sound["final"]["relative"] < 1
    page = (done / "report.html").read_text()
    assert f"failed at step 6: {reason}" in page
    assert "lost failed on seed 42" in page
    capsys.readouterr()
    train_command.show_status(toy_config, ["name=toy", WATCHED, f"sweep={section}"])
    said = capsys.readouterr().out
    assert "3 of 3 trials ended" in said
    assert re.search(rf"lost-seed42 +failed at 6/6, {reason}", said)
    assert plan_confirmation(load_sweep(toy_config, [WATCHED, f"sweep={section}"])[0]).losses.keys() == {
        "back",
        "sound",
    }


def test_a_probe_that_is_no_number_is_stopped_as_diverged(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Validator.measure

    def measure(self: Validator, weights: Any) -> Any:
        ((adapter, own),) = honest(self, weights).items()
        lost = {name: replace(reading, losses_NS=reading.losses_NS * np.nan) for name, reading in own.items()}
        return {adapter: lost}

    monkeypatch.setattr(Validator, "measure", measure)
    (trial,) = results(sweep("{prune: {diverged: 2}}")).values()
    assert (trial["status"], trial["step"], trial["best"]) == ("stopped", 3, None)


def test_a_measured_plan_writes_nothing_but_the_cache(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("{grid: {optimizer.lr: [1e-3, 2e-3, 3e-3]}, seeds: [1, 2]}", dry_run=True, measure=True)
    said = capsys.readouterr().out
    assert re.search(r"seed1 +3 trials per pass, activations of .* MiB per trial, peak memory .*, about 0:0", said)
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [".cache"]


def test_status_reads_a_stopped_sweep(
    sweep: Sweep, toy_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = "{grid: {optimizer.lr: [1e-3, 2e-3]}, seeds: [1, 2]}"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(StoppedBySignal):
            sweep(section)
    capsys.readouterr()
    train_command.show_status(toy_config, ["name=toy", WATCHED, f"sweep={section}"])
    said = capsys.readouterr().out
    assert "0 of 4 trials ended" in said
    assert "seed1  running, update 5 of 6, 2 trials" in said
    assert "seed2  waiting, update 0 of 6, 2 trials" in said


@pytest.mark.parametrize("rounding", [-1e-10, 1e-10])
def test_trials_that_differ_by_rounding_are_shown_in_their_order(rounding: float) -> None:
    row = {"status": "finished", "step": 6, "num_updates": 6, "reason": None, "best": None}
    losses = {"b": 0.9, "a": 0.9 + rounding, "best": 0.8, "none": None}
    trials = [{**row, "name": name, "final": loss and {"relative": loss, "step": 6}} for name, loss in losses.items()]
    assert [name for name, _ in record.result_rows({"trials": trials})] == ["best", "b", "a", "none"]


def test_a_config_without_a_sweep_section_is_told(toy_config: Path) -> None:
    with pytest.raises(ConfigError, match="there is no `sweep` section"):
        train_command.sweep(toy_config, [])


def test_train_runs_a_sweep_where_the_config_has_one(toy_config: Path, tmp_path: Path) -> None:
    train_command.train(toy_config, [WATCHED, "sweep={seeds: [3]}"])
    assert (tmp_path / "runs" / "toy" / "trials" / "base-seed3" / "base-seed3.safetensors").is_file()


@pytest.mark.process
def test_a_killed_sweep_resumes_to_the_byte_and_trains_no_finished_group_again(sweep: Sweep, tmp_path: Path) -> None:
    section = "{grid: {optimizer.lr: [1e-3, 2e-3]}, seeds: [1, 2], trials_per_pass: 2}"
    straight = sweep(section, "checkpoint.every_steps=2", name="straight")
    killed, finished = tmp_path / "runs" / "toy", dict[Path, int]()

    def killed_after_renaming_to(end: str) -> None:
        def kill(phase: str, operation: str, path: Path) -> None:
            if (phase, operation) == ("after", "rename") and str(path).endswith(end):
                os.kill(os.getpid(), signal.SIGKILL)

        with atomic_files.observe_operations(kill):
            sweep(section, "checkpoint.every_steps=2")

    for end in (
        "trials/lr1e-3-seed1/lr1e-3-seed1.safetensors",  # between the exports of two trials
        "groups/seed2/checkpoints/step-00000002",
    ):
        assert run_in_a_process(partial(killed_after_renaming_to, end)) == -signal.SIGKILL
        if "seed2" in end:
            finished = {file: file.stat().st_mtime_ns for file in killed.glob("trials/*-seed1/**/*.safetensors")}
    resumed = sweep(section, "checkpoint.every_steps=2")
    assert len(finished) == 6
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    for name in results(straight):
        ours, theirs = resumed / "trials" / name, straight / "trials" / name
        assert lora_files(ours) == lora_files(theirs)
        assert log(ours) == log(theirs)
    assert results(resumed) == results(straight)


@pytest.mark.process
def test_two_processes_train_group_after_group_as_one_does(
    sweep: Sweep,
) -> None:
    """Short runs first, then the sweep: the processes join once, and agree on what is left out."""
    short_runs = "prune: {short_runs: {length: 50%, keep: 2}}"
    section = f"{{grid: {{optimizer.lr: [1e-3, 2e-3, 3e-3]}}, seeds: [1, 2], trials_per_pass: 2, {short_runs}}}"
    one = sweep(section, "train.batch_size=2")
    assert run_in_world(2, lambda: sweep(section, "train.batch_size=1", name="two")) == [0, 0]
    two = results(one.with_name("two"))
    assert {name: trial["status"] for name, trial in two.items()} == {
        name: trial["status"] for name, trial in results(one).items()
    }
    finished = {name: trial for name, trial in results(one).items() if trial["status"] == "finished"}
    assert len(finished) == 4
    for name, trial in finished.items():
        assert two[name]["final"]["items"] == pytest.approx(trial["final"]["items"], rel=1e-5)
