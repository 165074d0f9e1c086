"""Trials that end early or are not begun, where that was asked: which, when, and what is said of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import stop_after
from toys import WATCHED

from lora_trainer.config.trials import load_sweep
from lora_trainer.errors import ConfigError, StoppedBySignal
from lora_trainer.experiments.sweep.derived import plan_short_runs
from lora_trainer.experiments.sweep.record import worse_arms
from lora_trainer.schedules.registry import SCHEDULES

Sweep = Callable[..., Path]


def test_stopping_what_is_behind_at_an_equal_step_is_no_setting(toy_config: Path) -> None:
    with pytest.raises(ConfigError, match=r"`sweep\.prune\.behind` is not a setting"):
        load_sweep(toy_config, [WATCHED, "sweep={prune: {behind: {at: 50%, keep: 6, accept_bias: equal-step}}}"])


def record(losses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What sweep.json says of finished trials of seeds 0, 1, 2 ..."""
    plain = {"peak_lr": 1e-4, "lr_budget": 1.0, "status": "finished", "reason": None, "step": 9}
    return {
        "trials": [
            {"arm": arm, "setting": arm, "seed": seed, "final": {"relative": loss}, **plain}
            for arm, values in losses.items()
            for seed, loss in enumerate(values)
        ]
    }


def test_an_arm_clearly_worse_gets_no_further_seeds_and_the_reason_has_the_numbers() -> None:
    stream = np.random.default_rng(0)
    seeds = 0.8 + stream.normal(0, 0.02, 3)
    good, close, bad = (seeds + shift + stream.normal(0, 2e-4, 3) for shift in (0, 1e-4, 0.1))
    reasons = worse_arms(record({"good": good, "close": close, "bad": bad}), after=3, num_seeds=5)
    assert set(reasons) == {"bad"}
    assert reasons["bad"].startswith("sweep.prune.worse_after_seeds: good was better by 0.")
    assert reasons["bad"].endswith("needed)") and "on 3 seeds" in reasons["bad"]
    assert worse_arms(record({"good": good[:2], "bad": bad[:2]}), after=3, num_seeds=5) == {}


def test_of_six_equal_arms_one_is_dropped_in_at_most_five_percent_of_sweeps() -> None:
    """All looks of a sweep together: after three of five seeds and after four."""
    stream, dropped = np.random.default_rng(1), 0
    num = 300
    for _ in range(num):
        losses = 0.8 + stream.normal(0, 0.02, 5) + stream.normal(0, 0.01, (6, 5))
        dropped += any(
            worse_arms(record({str(i): own[:looked] for i, own in enumerate(losses)}), 3, 5) for looked in (3, 4)
        )
    assert dropped / num <= 0.05


def test_a_sweep_drops_an_arm_before_its_last_seed_and_says_so(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = "trials: {still: {optimizer.lr: 1e-9}, learns: {optimizer.lr: 1e-2}}, seeds: [1, 2, 3, 4, 5]"
    section = f"{{{arms}, prune: {{worse_after_seeds: 4}}}}"
    done = sweep(section)
    content = json.loads((done / "sweep.json").read_text())
    trials = {trial["name"]: trial for trial in content["trials"]}
    assert len(trials) == 10
    dropped = trials["still-seed5"]
    assert (dropped["status"], dropped["step"], dropped["final"]) == ("stopped", 0, None)
    assert dropped["reason"].startswith("sweep.prune.worse_after_seeds: learns was better by 0.")
    assert {name for name, trial in trials.items() if trial["status"] != "finished"} == {"still-seed5"}
    assert not (done / "trials" / "still-seed5").exists()
    assert [group["trials"] for group in content["groups"]][-1] == ["learns-seed5"]
    page = (done / "report.html").read_text()
    assert f"still-seed5 was not trained: {dropped['reason']}" in page
    sweep(section)
    assert json.loads((done / "sweep.json").read_text())["trials"] == content["trials"]
    sweep(f"{{{arms}}}")  # without the rule the arm gets its seed
    after = {t["name"]: t for t in json.loads((done / "sweep.json").read_text())["trials"]}
    assert {trial["status"] for trial in after.values()} == {"finished"}
    assert {name: after[name] for name in trials if name != "still-seed5"} == {
        name: trial for name, trial in trials.items() if name != "still-seed5"
    }


def test_a_stopped_sweep_keeps_what_it_decided(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    section = "{trials: {wild: {optimizer.lr: 0.9, adapter.targets: [conv_out]}, tame: {}}, prune: {diverged: 1.05}}"
    straight = sweep(section, name="straight")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedBySignal):
            sweep(section)
    resumed = sweep(section)
    ours, theirs = (json.loads((folder / "sweep.json").read_text())["trials"] for folder in (resumed, straight))
    assert ours == theirs
    assert [(trial["status"], trial["step"]) for trial in ours] == [("stopped", 3), ("finished", 6)]


def short(toy_config: Path, section: str, *overrides: str) -> Any:
    words = ["name=toy", WATCHED, f"sweep={section}", *overrides]
    return plan_short_runs(*load_sweep(toy_config, words))


def test_curves_that_do_not_shrink_with_the_run_are_refused(toy_config: Path) -> None:
    text = (
        "{grid: {lr_scheduler: [{type: cosine, warmup_steps: %s}, {type: rex}]}, prune: {short_runs: {length: 20%%}}}"
    )
    with pytest.raises(ConfigError, match="`cosine-warmup_steps20` does not shrink with a run of 20 updates") as caught:
        short(toy_config, text % "20", "train.max_steps=100")
    assert len(caught.value.problems) == 1
    planned = short(toy_config, text % "20%", "train.max_steps=100")
    assert (planned.num_steps, planned.seed, planned.keep, planned.folder.name) == (20, 42, 2, "toy-short")
    with pytest.raises(ConfigError, match="a share of one length for all"):
        short(toy_config, text % "20%", "train={epochs: 3, threads: 1}")


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("torch", "plateau")])
def test_every_schedule_written_in_shares_shrinks(toy_config: Path, name: str) -> None:
    options = {
        "constant_with_warmup": {"warmup_steps": "10%"},
        "exponential": {"unit": "step", "final_ratio": 0.01},
        "inverse_sqrt": {"timescale": "10%"},
    }.get(name, SCHEDULES[name].example)
    section = json.dumps({"trials": {"a": {"lr_scheduler": {"type": name, **options}}}, "prune": {"short_runs": {}}})
    assert short(toy_config, section, "train.max_steps=400").num_steps == 100


def test_each_setting_keeps_its_best_lrs_of_the_short_runs(toy_config: Path) -> None:
    grid = "{lr_scheduler: [{type: constant}, {type: linear}], optimizer.lr: [1e-4, 1e-3, 1e-2]}"
    section = f"{{grid: {grid}, prune: {{short_runs: {{keep: 1}}}}}}"
    planned = short(toy_config, section, "train.max_steps=40")
    losses = {"constant": (0.9, 0.7, 2.0), "linear": (0.95, 0.8, 0.6)}
    rows = [
        {"arm": f"{setting}-lr{lr:.0e}", "setting": setting, "seed": 42, "peak_lr": lr, "lr_budget": 1.0}
        | {"status": "finished", "reason": None, "final": {"relative": loss}}
        for setting, values in losses.items()
        for lr, loss in zip((1e-4, 1e-3, 1e-2), values, strict=True)
    ]
    reasons = planned.dropped_arms({"trials": rows})
    assert set(reasons) == {"constant-lr1e-04", "constant-lr1e-02", "linear-lr1e-04", "linear-lr1e-03"}
    reason = reasons["linear-lr1e-04"]
    assert reason.startswith("sweep.prune.short_runs: ")
    loss, updates, seed, best, its_lr = "0.9500", "10", "42", "0.6000", "0.01"
    assert re.findall(r"\d[\d.]*", reason) == [loss, updates, seed, best, its_lr]


def test_short_runs_are_planned_before_anything_is_trained(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("{grid: {optimizer.lr: [1e-4, 1e-3]}, prune: {short_runs: {length: 50%, keep: 1}}}", dry_run=True)
    said = capsys.readouterr().out
    assert said.startswith("first: short runs of 3 updates choose 1 of the LRs of each setting")
    assert said.index("Plan of toy-short") < said.index("Plan of toy\n")
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [".cache"]


def test_short_runs_come_first_and_their_choice_counts_as_tuning(sweep: Sweep) -> None:
    grid = "{lr_scheduler: [{type: constant}, {type: linear}], optimizer.lr: [1e-4, 1e-3, 1e-2]}"
    section = f"{{grid: {grid}, seeds: [1, 2, 3], prune: {{short_runs: {{length: 50%, keep: 1}}}}}}"
    done = sweep(section)
    shorts = json.loads((done.with_name("toy-short") / "sweep.json").read_text())["trials"]
    assert [(trial["num_updates"], trial["status"], trial["seed"]) for trial in shorts] == [(3, "finished", 1)] * 6
    trials = json.loads((done / "sweep.json").read_text())["trials"]
    finished = {trial["arm"] for trial in trials if trial["status"] == "finished"}
    best = {
        min((t for t in shorts if t["setting"] == setting), key=lambda t: t["final"]["relative"])["arm"]
        for setting in ("constant", "linear")
    }
    assert finished == best
    left_out = [trial for trial in trials if trial["status"] == "stopped"]
    assert len(left_out) == 12
    assert all(trial["reason"].startswith("sweep.prune.short_runs: held-out loss") for trial in left_out)
    page = (done / "report.html").read_text()
    assert "LR tuned per setting" in page
    assert all(f"{trial['name']} was not trained" in page for trial in left_out)
    before = (done / "sweep.json").read_bytes()
    sweep(section)  # finished, both of them
    assert (done / "sweep.json").read_bytes() == before
