"""The learning-rate finder on a real base: two groups of trials, what they measure, and what they leave alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import spoil_gradients, spoil_losses
from worlds import run_in_world

from lora_trainer.cli.find_lr import find_lr as find_lr_command
from lora_trainer.cli.program import main
from lora_trainer.config.load import load_config
from lora_trainer.errors import ConfigError, StoppedBySignal
from lora_trainer.experiments.lr_finder.analysis import FinderResult
from lora_trainer.experiments.lr_finder.prepare import FinderOptions, PreparedFinder, prepare_finder
from lora_trainer.experiments.lr_finder.run import find_lr, run_short
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.planning.run_plan import resolve_param_groups
from lora_trainer.runtime.launch import Launch
from lora_trainer.runtime.runtime import joined_processes
from lora_trainer.schedules.schedule import Horizon
from lora_trainer.tracking.console import MainConsole
from lora_trainer.tracking.metrics import read_rows, step_rows
from lora_trainer.training.group import TrialGroup

HELD_OUT = "validation={fraction: 0.3, batch_size: 32}"  # a probe of two images is one forward
SMALL = FinderOptions(num_steps=30, start_lr=1e-4, end_lr=0.1, num_images=2)
LRS = np.geomspace(1e-4, 0.1, 30)
OF_A_LOG = {"config.yaml", "environment.json", "metrics.jsonl", "plan.json", "validation.json"}
"""All that a group leaves that only logs."""


def silent(items: Any, _: str, __: int) -> Any:
    return items


def finder_of(config: Path, *overrides: str, options: FinderOptions = SMALL) -> PreparedFinder:
    return prepare_finder(load_config(config, [HELD_OUT, *overrides]), Launch(), options, silent)


def found_by(finder: PreparedFinder) -> FinderResult:
    return find_lr(finder, console=MainConsole(silent=True))


def short_runs(group: TrialGroup, console: MainConsole | None = None) -> dict[float, np.ndarray | None]:
    with joined_processes(Launch()) as joined:
        return run_short(group, console=console or MainConsole(silent=True), should_stop=lambda: False, joined=joined)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row.get("event") == name]


def files_digest(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def lrs_of(found: FinderResult) -> list[float]:
    return [each.lr for each in found.points]


def test_the_ramp_is_a_group_of_one_that_is_validated_at_every_step_and_leaves_its_log_alone(toy_config: Path) -> None:
    finder = finder_of(toy_config, "adapter.dropout=0.1", "export.every_steps=1", "checkpoint.every_steps=1")
    found = found_by(finder)
    assert finder.folder.name == "toy-find-lr"
    assert {file.name for file in finder.folder.iterdir()} == OF_A_LOG
    probes = events(finder.folder, "validation")
    assert [row["step"] for row in probes] == list(range(31))
    assert {row["probe"] for row in probes} == {"held_out"}
    rows = step_rows(finder.folder / "metrics.jsonl")
    np.testing.assert_allclose([row["lr"] for row in rows], LRS, rtol=1e-12)
    assert lrs_of(found) == [row["lr"] for row in rows]
    assert [each.grad_norm for each in found.points] == [row["grad_norm"] for row in rows]
    assert [each.training_loss for each in found.points] == [row["loss"] for row in rows]
    for each, probe in zip(found.points, probes[1:], strict=True):
        assert each.relative_NS is not None
        assert each.relative_NS.shape == (2, 16)
        np.testing.assert_allclose(each.relative_NS.mean(axis=1), probe["items"], rtol=1e-8)
        assert each.gain == pytest.approx(probe["gain"], abs=1e-9)


def test_both_groups_are_plain_data(toy_config: Path) -> None:
    finder = finder_of(toy_config)
    for group in (finder.ramp_group(), finder.verification_group([1e-4, 1e-3])):
        assert TrialGroup.from_json(group.to_json()) == group


def test_the_optimizer_uses_the_ramps_rates_and_groups_keep_their_ratio(
    toy_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[list[float]] = []
    honest = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        used.append([group["lr"] for group in self.param_groups])
        return honest(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    groups = "optimizer.groups=[{name: values, match: [to_v], lr: 1e-4, lr_scheduler: {type: linear}}]"
    found = found_by(finder_of(toy_config, groups))
    assert [own[0] for own in used] == lrs_of(found)
    np.testing.assert_allclose([own[0] for own in used], LRS, rtol=1e-12)
    np.testing.assert_allclose([own[1] / own[0] for own in used], 0.1, rtol=1e-12)  # 1e-4 beside the toy's 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "schedule_free_adamw"])
def test_other_optimizers_ramp_too(toy_config: Path, optimizer: str) -> None:
    words = (f"optimizer={{type: {optimizer}, lr: 1e-2}}", "lr_scheduler={type: constant}")
    found = found_by(finder_of(toy_config, *words))
    np.testing.assert_allclose(lrs_of(found), LRS, rtol=1e-12)


def stop_at(poll: int) -> Callable[[], bool]:
    polls = iter(range(10**6))
    return lambda: next(polls) >= poll


def test_a_stop_leaves_no_answer_and_the_next_start_begins_anew(toy_config: Path) -> None:
    finder = finder_of(toy_config)
    with pytest.raises(StoppedBySignal, match="there is no answer yet"):
        find_lr(finder, console=MainConsole(silent=True), should_stop=stop_at(5))
    assert [row["step"] for row in step_rows(finder.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    again = found_by(finder_of(toy_config))
    assert len(again.points) == 30
    elsewhere = found_by(finder_of(toy_config, "name=other"))
    assert again.points == elsewhere.points
    assert [row["step"] for row in step_rows(finder.folder / "metrics.jsonl")] == list(range(1, 31))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_numbers_that_are_not_finite_end_the_ramp_as_a_divergence(
    toy_config: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The sixth update, at once: a ramp does not try three."""
    finder = finder_of(toy_config)
    if fault == "gradient":
        spoil_gradients(monkeypatch, [5])
    else:
        spoil_losses(monkeypatch, [1 + 2 * 5])  # forwards: the base's probe, then each update and the probe after it
    found = found_by(finder)
    assert [each.is_finite for each in found.points] == [True] * 5 + [False]
    assert found.points[-1].relative_NS is None
    assert found.points[-1].lr == pytest.approx(LRS[5])
    assert [skip["reason"] for skip in events(finder.folder, "skip")] == [fault]
    assert [failed["step"] for failed in events(finder.folder, "failed")] == [6]


def test_a_ramp_ends_where_the_probe_has_diverged(toy_config: Path) -> None:
    options = FinderOptions(num_steps=30, start_lr=1e-2, end_lr=1.0, num_images=2)
    hot = ("adapter.alpha=400", "adapter.targets=transformer+resnet")
    finder = finder_of(toy_config, *hot, options=options)
    found = found_by(finder)
    assert len(found.points) < 30
    assert found.points[-1].is_diverged
    assert not found.points[0].is_diverged
    rows = list(read_rows(finder.folder / "metrics.jsonl"))
    assert rows[-1]["step"] == len(found.points)


def test_an_fp16_overflow_leaves_its_point_out(toy_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_gradients(monkeypatch, [5, 6, 20], value=float("inf"))
    finder = finder_of(toy_config, "train.precision=fp16")
    found = found_by(finder)
    np.testing.assert_allclose(lrs_of(found), np.delete(LRS, [5, 6, 20]), rtol=1e-12)
    assert all(each.is_finite for each in found.points)
    assert [skip["step"] for skip in events(finder.folder, "skip")] == [6, 7, 21]
    assert found.points[5].lr == pytest.approx(LRS[7])


class TestVerification:
    LRS = (1e-4, 1e-3, 1e-2)
    OPTIONS = FinderOptions(num_steps=30, num_images=2, verify=True, num_verify_steps=5)

    @pytest.fixture
    def finder(self, toy_config: Path) -> PreparedFinder:
        return finder_of(toy_config, options=self.OPTIONS)

    def test_its_rates_are_exact_and_groups_keep_their_ratio(self, toy_config: Path) -> None:
        groups = "optimizer.groups=[{name: values, match: [to_v], lr: 7e-5}, {name: keys, match: [to_k]}]"
        finder = finder_of(toy_config, groups, "optimizer.lr=0.0007", options=self.OPTIONS)
        for member, lr in zip(finder.verification_group(self.LRS).members, self.LRS, strict=True):
            rates = [
                group.lr(k)
                for k in (0, 4)
                for group in resolve_param_groups(member.prepared.config, Horizon(5, 3), "unet")
            ]
            assert rates == pytest.approx([lr, lr / 10, lr] * 2, rel=1e-12)
            assert rates[0] == lr

    def test_it_trains_its_rates_packed_and_equals_solo_runs(
        self, finder: PreparedFinder, train_toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        packed = short_runs(finder.verification_group(self.LRS), MainConsole())
        assert "trials per forward: 3" in capsys.readouterr().out
        assert [*packed] == pytest.approx(self.LRS, rel=1e-12)
        watched = "validation={fraction: 0.3, every_steps: 5, max_cost: 1.0}"
        for number, (lr, after_NS) in enumerate(zip(self.LRS, packed.values(), strict=True)):
            constant = ("lr_scheduler={type: constant}", f"optimizer.lr={lr}", "train.max_steps=5")
            alone = train_toy(watched, *constant, name=f"alone{number}")
            reading = [row for row in events(alone, "validation") if row["probe"] == "held_out"][-1]
            assert after_NS is not None
            np.testing.assert_allclose(after_NS.mean(axis=1), reading["items"], rtol=1e-5)
        assert len({after_NS.tobytes() for after_NS in packed.values() if after_NS is not None}) == 3

    def test_each_rate_leaves_a_log_and_nothing_else(self, finder: PreparedFinder) -> None:
        short_runs(finder.verification_group(self.LRS))
        folder = finder.folder / "verify"
        assert sorted(each.name for each in folder.iterdir()) == ["lr1.0e-02", "lr1.0e-03", "lr1.0e-04"]
        logs = [step_rows(each / "metrics.jsonl") for each in sorted(folder.iterdir())]
        for each, rows, lr in zip(sorted(folder.iterdir()), logs, sorted(self.LRS, reverse=True), strict=True):
            assert {file.name for file in each.iterdir()} == OF_A_LOG
            assert [row["lr"] for row in rows] == pytest.approx([lr] * 5, rel=1e-12)
            assert [row["step"] for row in events(each, "validation")] == [0, 5]
        assert len({tuple(row["draws"] for row in rows) for rows in logs}) == 1

    def test_a_rate_whose_numbers_are_not_finite_has_diverged_and_the_others_do_not_notice(
        self, finder: PreparedFinder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        group = finder.verification_group(self.LRS)
        healthy = [*short_runs(group).values()]
        spoil_gradients(monkeypatch, [3], trial="lr1.0e-03")
        runs = [*short_runs(group).values()]
        assert runs[1] is None
        for one, other in ((0, 0), (2, 2)):
            ours, theirs = runs[one], healthy[other]
            assert ours is not None
            assert theirs is not None
            assert np.array_equal(ours, theirs)


def find(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["find-lr", *words])
    return int(ended.value.code or 0)


def test_the_program_end_to_end(
    toy_config: Path, tmp_path: Path, train_toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train_toy(HELD_OUT)
    before = files_digest(run_dir)
    words = ["-c", str(toy_config), HELD_OUT, "--steps", "32", "--start-lr", "1e-4", "--images", "2"]
    folder = tmp_path / "runs" / "toy-find-lr"
    found = []
    for _ in range(2):
        assert find(*words, "--verify", "--verify-steps", "2") == 0
        found.append(json.loads((folder / "find_lr.json").read_text()))
    said = capsys.readouterr().out
    assert files_digest(run_dir) == before
    assert {file.name for file in folder.iterdir()} == OF_A_LOG | {".lock", "find_lr.json", "find_lr.png", "verify"}
    assert not [file for file in folder.rglob("*") if file.suffix == ".safetensors" or file.name == "checkpoints"]
    assert (folder / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    first, second = found
    assert first.pop("time")
    assert second.pop("time")
    assert first == second
    assert first["finding"]["verdict"] == "found"
    assert f"optimizer.lr={first['lr']:.1e}" in said
    runs = first["forks"]["events"]
    assert [run["lr"] for run in runs] == sorted({run["lr"] for run in runs})
    assert [run["factor"] for run in runs] == pytest.approx([run["lr"] / 1e-3 for run in runs])
    assert all(run["event"] == "fork" and len(run["items"]) == 2 for run in runs)
    assert first["forks"]["choice"] == first["lr"]
    start = np.array(first["probe"]["start"])
    for point in first["points"]:
        falls = (start - np.array(point["probe"])).ravel()
        assert point["gain"] == pytest.approx(falls.mean(), abs=1e-8)
        assert point["se"] == pytest.approx(falls.std(ddof=1) / math.sqrt(falls.size), abs=1e-8)


@pytest.mark.process
def test_two_processes_find_what_one_does(toy_config: Path, tmp_path: Path) -> None:
    """Both groups train in one world: processes that joined once do not join a second time."""
    options = FinderOptions(num_steps=30, start_lr=1e-4, end_lr=0.1, num_images=2, verify=True, num_verify_steps=2)
    alone, shared = ([f"name={name}", HELD_OUT, f"train.batch_size={size}"] for name, size in (("one", 2), ("two", 1)))
    find_lr_command(toy_config, alone, options)
    assert run_in_world(2, lambda: find_lr_command(toy_config, shared, options)) == [0, 0]
    one, two = (
        json.loads((tmp_path / "runs" / f"{name}-find-lr" / "find_lr.json").read_text()) for name in ("one", "two")
    )
    assert one["lr"] == two["lr"]
    assert [point["lr"] for point in one["points"]] == [point["lr"] for point in two["points"]]
    gains = ([point["gain"] for point in each["points"]] for each in (one, two))
    np.testing.assert_allclose(*gains, rtol=1e-3, atol=1e-6)
    assert [run["gain"] for run in two["forks"]["events"]] == pytest.approx(
        [run["gain"] for run in one["forks"]["events"]], rel=1e-3, abs=1e-6
    )


def held_out_by(finder: PreparedFinder) -> list[str]:
    return [record.name for record in finder.prepared.split.held_out]


def test_an_earlier_ramp_does_not_decide_which_images_are_held_out(toy_config: Path) -> None:
    found_by(finder_of(toy_config))
    other_seeds = [f"validation={{fraction: 0.3, seed: {seed}}}" for seed in range(1, 5)]
    for seed in other_seeds:
        assert held_out_by(finder_of(toy_config, seed)) == held_out_by(finder_of(toy_config, seed, "name=untouched"))
    assert len({tuple(held_out_by(finder_of(toy_config, seed))) for seed in other_seeds}) > 1


def test_without_validation_it_refuses_with_the_fix(toy_config: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_finder(load_config(toy_config), Launch(), SMALL, silent)
    assert "validation: {fraction: 0.1}" in str(refused.value.problems[0].fix)


def test_all_that_is_wrong_is_told_at_once(toy_config: Path) -> None:
    config = load_config(toy_config, ["optimizer={type: prodigy}"])
    with pytest.raises(ConfigError) as refused:
        prepare_finder(config, Launch(), FinderOptions(num_steps=5, start_lr=1e-2, end_lr=1e-3), silent)
    said = [problem.what for problem in refused.value.problems]
    assert len(said) == 4
    assert any("prodigy" in what for what in said)
    assert any("too coarse" in what for what in said)
    assert any("does not rise" in what for what in said)


def gains(runs: Mapping[float, np.ndarray | None], start_NS: np.ndarray) -> Sequence[float]:
    return [-math.inf if after is None else float((start_NS - after).mean()) for after in runs.values()]


def test_the_suggestion_serves_nearly_as_well_as_the_best_of_a_grid(toy_config: Path) -> None:
    """The short form of benchmarks/evaluation/evaluate_find_lr.py."""
    options = FinderOptions(num_steps=32, start_lr=1e-4, end_lr=1.0, num_images=2, num_verify_steps=30)
    finder = finder_of(toy_config, options=options)
    found = found_by(finder)
    assert found.reading.verdict == "found"
    grid = [1e-4, 1e-3, 1e-2, 1e-1]
    *others, suggested = gains(short_runs(finder.verification_group([*grid, found.reading.suggestion])), found.start_NS)
    assert suggested >= 0.8 * max(*others, suggested)


def test_a_model_that_cannot_learn_has_no_signal(toy_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser's output is cut off, so no adapter inside has any effect."""
    honest = StableDiffusion.load_denoiser

    def cut_off(self: StableDiffusion, *arguments: Any) -> Any:
        model = honest(self, *arguments)
        for parameter in model.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
        return model

    monkeypatch.setattr(StableDiffusion, "load_denoiser", cut_off)
    finder = finder_of(toy_config)
    reading = found_by(finder).reading
    assert (reading.verdict, reading.suggestion) == ("no signal", 1e-4)
