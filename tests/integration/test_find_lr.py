"""The learning-rate finder on a real base: what it measures, what it leaves, and that everything comes back bitwise."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_trainer.experiments.lr_finder.ramp import Ramp

from lora_trainer.cli.program import main
from lora_trainer.config.load import load_config
from lora_trainer.errors import ConfigError, StoppedBySignal
from lora_trainer.experiments.lr_finder.analysis import analyse
from lora_trainer.experiments.lr_finder.prepare import FinderOptions, PreparedFinder, prepare_finder
from lora_trainer.experiments.lr_finder.run import Instrument, restored
from lora_trainer.runtime.launch import Launch
from lora_trainer.runtime.runtime import start_runtime
from lora_trainer.tracking.console import Screen
from lora_trainer.training.optimizer_step import Updater, UpdateResult
from lora_trainer.training.setup import Assembly, assemble
from lora_trainer.training.trial import TrialSpec
from lora_trainer.training.validation import Validator

CPU = torch.device("cpu")
HELD_OUT = "validation={fraction: 0.3}"
SMALL = FinderOptions(num_updates=32, start_lr=1e-4, end_lr=1.0, num_images=2)


def silent(items: object, _: str, __: int) -> object:
    return items


def finder_of(config: Path, *overrides: str, options: FinderOptions = SMALL) -> PreparedFinder:
    return prepare_finder(load_config(config, [HELD_OUT, *overrides]), Launch(), options, silent)  # type: ignore[arg-type]


def short(finder: PreparedFinder) -> PreparedFinder:
    """The same with a ramp of eight updates, too few to read."""
    return replace(finder, ramp=Ramp(1e-4, 1.0, 8))


@contextmanager
def assembled(finder: PreparedFinder) -> Iterator[Assembly]:
    prepared = finder.prepared
    with start_runtime(prepared.launch, "fp32", 1) as runtime:
        spec = TrialSpec("trial", prepared.config)
        yield assemble(prepared, [spec], runtime, Screen(silent=True))


def state_digest(parts: Assembly) -> str:
    """Of everything that training could change: weights, optimizer, base, torch's, numpy's and Python's randomness."""
    digest = hashlib.sha256()
    tensors, plain = parts.trials[0].state()
    for part in sorted(tensors):
        for name, tensor in sorted(tensors[part].items()):
            digest.update(f"{part} {name} {tensor.dtype}".encode() + tensor.cpu().numpy().tobytes())
    for name, tensor in parts.denoiser.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    digest.update(json.dumps([plain, parts.updater.state(), parts.denoiser.training], sort_keys=True).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    digest.update(repr((random.getstate(), np.random.get_state())).encode())
    return digest.hexdigest()


def files_digest(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("interrupted", [False, True])
def test_everything_comes_back_bitwise(toy_config: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool) -> None:
    finder = short(finder_of(toy_config, "adapter.dropout=0.1"))
    with assembled(finder) as parts:
        for k in range(3):
            parts.updater.run(k, k, stop_asked=False)
        before = state_digest(parts)
        instrument = Instrument(parts, CPU, lambda: False)
        if interrupted:
            measure, calls = Validator.measure, iter(range(100))

            def interrupt(self: Validator, adapter: str, weights: dict[str, torch.Tensor]) -> object:
                if next(calls) == 4:
                    raise KeyboardInterrupt
                return measure(self, adapter, weights)

            monkeypatch.setattr(Validator, "measure", interrupt)
            with pytest.raises(KeyboardInterrupt):
                instrument.run_ramp(finder, Screen(silent=True))
        else:
            assert len(instrument.run_ramp(finder, Screen(silent=True))) == 8
        assert state_digest(parts) == before


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
def test_training_goes_on_after_the_finder_as_without_it(toy_config: Path, optimizer: str) -> None:
    words = ["adapter.dropout=0.1", f"optimizer={{type: {optimizer}}}", "lr_scheduler={type: constant}"]
    finder = short(finder_of(toy_config, *words))
    digests = []
    for with_finder in (False, True):
        with assembled(finder) as parts:
            for k in range(4):
                if k == 2 and with_finder:
                    instrument = Instrument(parts, CPU, lambda: False)
                    instrument.run_ramp(finder, Screen(silent=True))
                    instrument.run_forks([1e-3, 1e-2], 2, Screen(silent=True))
                parts.updater.run(k, k, stop_asked=False)
            tensors, _ = parts.trials[0].state()
            digests.append({name: t.clone() for own in tensors.values() for name, t in own.items()})
    for name, tensor in digests[0].items():
        assert torch.equal(tensor, digests[1][name]), name


def test_restoring_covers_an_optimizer_that_had_no_state_yet(toy_config: Path) -> None:
    with assembled(finder_of(toy_config)) as parts:
        trial = parts.trials[0]
        with restored(trial, parts.updater, CPU):
            parts.updater.run(0, 0, stop_asked=False)
            assert trial.optimizer.state
        assert not trial.optimizer.state
        assert all(p.grad is None for p in trial.parameters.values())


def test_each_update_uses_the_ramps_rate_and_groups_keep_their_ratio(
    toy_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = "optimizer.groups=[{name: values, match: [to_v], lr: 1e-4, lr_scheduler: {type: linear}}]"
    finder = short(finder_of(toy_config, groups))
    with assembled(finder) as parts:
        used: list[list[float]] = []
        optimizer = parts.trials[0].optimizer
        optimizer.register_step_pre_hook(lambda own, *_: used.append([group["lr"] for group in own.param_groups]))
        measured = Instrument(parts, CPU, lambda: False).run_ramp(finder, Screen(silent=True))
    np.testing.assert_allclose([own[0] for own in used], np.geomspace(1e-4, 1, 8)[: len(used)], rtol=1e-12)
    np.testing.assert_allclose([own[1] / own[0] for own in used], 0.1, rtol=1e-12)  # 1e-4 beside the toy's 1e-3
    assert [each.point.lr for each in measured] == [own[0] for own in used]


def test_a_stop_leaves_no_result(toy_config: Path) -> None:
    finder = short(finder_of(toy_config))
    asked = iter([False] * 5)
    with assembled(finder) as parts:
        before = state_digest(parts)
        with pytest.raises(StoppedBySignal):
            Instrument(parts, CPU, lambda: next(asked, True)).run_ramp(finder, Screen(silent=True))
        assert state_digest(parts) == before


@pytest.mark.parametrize("fault", ["loss", "fp16 overflow"])
def test_numbers_that_are_not_finite_end_the_ramp_as_a_divergence(
    toy_config: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    finder, run = short(finder_of(toy_config)), Updater.run

    def failing(self: Updater, attempt: int, step: int, *, stop_asked: bool) -> UpdateResult:
        result = run(self, attempt, step, stop_asked=stop_asked)
        return result if step < 5 else replace(result, skipped=fault, trials={})

    monkeypatch.setattr(Updater, "run", failing)
    with assembled(finder) as parts:
        measured = Instrument(parts, CPU, lambda: False).run_ramp(finder, Screen(silent=True))
    assert [each.point.is_finite for each in measured] == [True] * 5 + [False]


def test_the_program_end_to_end(
    toy_config: Path, tmp_path: Path, train_toy: object, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train_toy(HELD_OUT)  # type: ignore[operator]
    before = files_digest(run_dir)
    words = ["find-lr", "-c", str(toy_config), HELD_OUT, "--steps", "32", "--start-lr", "1e-4", "--images", "2"]
    folder = tmp_path / "runs" / "toy-find-lr"
    found = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--verify", "--verify-steps", "2"])
        assert ended.value.code == 0
        found.append(json.loads((folder / "find_lr.json").read_text()))
    said = capsys.readouterr().out
    assert files_digest(run_dir) == before
    assert {file.name for file in folder.iterdir()} == {".lock", "find_lr.json", "find_lr.png"}
    assert (folder / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    first, second = found
    assert first.pop("time")
    assert second.pop("time")
    assert first == second
    assert first["finding"]["verdict"] == "found"
    assert f"optimizer.lr={first['lr']:.1e}" in said
    forks = first["forks"]["events"]
    assert [fork["lr"] for fork in forks] == sorted({fork["lr"] for fork in forks})
    assert [fork["factor"] for fork in forks] == pytest.approx([fork["lr"] / 1e-3 for fork in forks])
    assert all(fork["event"] == "fork" and len(fork["items"]) == 2 for fork in forks)
    assert first["forks"]["choice"] == first["lr"]
    start = np.array(first["probe"]["start"])
    for point in first["points"]:
        falls = (start - np.array(point["probe"])).ravel()
        assert point["gain"] == pytest.approx(falls.mean(), abs=1e-8)
        assert point["se"] == pytest.approx(falls.std(ddof=1) / math.sqrt(falls.size), abs=1e-8)


def test_without_validation_it_refuses_with_the_fix(toy_config: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_finder(load_config(toy_config), Launch(), SMALL, silent)  # type: ignore[arg-type]
    assert "validation: {fraction: 0.1}" in str(refused.value.problems[0].fix)


def test_all_that_is_wrong_is_told_at_once(toy_config: Path) -> None:
    config = load_config(toy_config, ["optimizer={type: prodigy}"])
    with pytest.raises(ConfigError) as refused:
        prepare_finder(config, Launch(), FinderOptions(num_updates=5, start_lr=1e-2, end_lr=1e-3), silent)  # type: ignore[arg-type]
    said = [problem.what for problem in refused.value.problems]
    assert len(said) == 4
    assert any("prodigy" in what for what in said)
    assert any("too coarse" in what for what in said)
    assert any("does not rise" in what for what in said)


def test_the_suggestion_serves_nearly_as_well_as_the_best_of_a_grid(toy_config: Path) -> None:
    """The short form of benchmarks/evaluation/evaluate_find_lr.py."""
    finder = finder_of(toy_config)
    with assembled(finder) as parts:
        instrument = Instrument(parts, CPU, lambda: False)
        finding = analyse([each.point for each in instrument.run_ramp(finder, Screen(silent=True))], 1e-4)
        gains = {}
        for lr in [1e-4, 1e-3, 1e-2, 1e-1, finding.suggestion]:
            relative_NS = instrument.run_constant(lr, 30)
            gains[lr] = float("-inf") if relative_NS is None else float((instrument.start_NS - relative_NS).mean())
    assert finding.verdict == "found"
    assert gains[finding.suggestion] >= 0.8 * max(gains.values())


def test_a_model_that_cannot_learn_has_no_signal(toy_config: Path) -> None:
    """The denoiser's output is cut off, so no adapter inside has any effect."""
    finder = short(finder_of(toy_config))
    with assembled(finder) as parts:
        for parameter in parts.denoiser.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
        measured = Instrument(parts, CPU, lambda: False).run_ramp(finder, Screen(silent=True))
    finding = analyse([each.point for each in measured], 1e-4)
    assert (finding.verdict, finding.suggestion) == ("no signal", 1e-4)
