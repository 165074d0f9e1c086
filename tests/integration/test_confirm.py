"""A sweep's leaders on fresh seeds: who they are, which seeds, and what the report then says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import WATCHED

from lora_trainer.cli.train import confirm
from lora_trainer.config.trials import load_sweep
from lora_trainer.errors import ConfigError
from lora_trainer.experiments.sweep.derived import plan_confirmation
from lora_trainer.training import fit as fit_module

Sweep = Callable[..., Path]
GRID = "grid: {lr_scheduler: [{type: constant}, {type: linear}], optimizer.lr: [1e-4, 1e-3, 3e-3]}"


def trial(setting: str, lr: float, seed: int, loss: float | None, status: str = "finished") -> dict[str, Any]:
    """A row of sweep.json for an arm of `GRID`."""
    arm = f"{setting}-lr{lr:.0e}".replace("e-0", "e-")
    return {
        "name": f"{arm}-seed{seed}",
        "arm": arm,
        "setting": setting,
        "seed": seed,
        "overrides": {"lr_scheduler": {"type": setting}, "optimizer.lr": lr},
        "peak_lr": lr,
        "lr_budget": 1.0,
        "status": status,
        "reason": None,
        "final": None if loss is None else {"step": 6, "relative": loss},
        "best": None,
        "folder": f"trials/{arm}-seed{seed}",
        "group": None,
        "step": 6,
        "num_updates": 6,
    }


@pytest.fixture
def recorded(toy_config: Path, tmp_path: Path) -> Callable[..., Any]:
    """The configuration of a sweep whose record has these trials."""

    def write(*trials: dict[str, Any], section: str = "", name: str = "toy") -> Any:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sweep.json").write_text(
            json.dumps({"format": 1, "name": name, "shared": {}, "trials": trials, "groups": []})
        )
        words = ["validation={fraction: 0.34}", f"sweep={{{GRID}, {section}}}"]
        return load_sweep(toy_config, words)[0]

    return write


def test_each_setting_is_led_by_its_best_lr_over_all_seeds(recorded: Callable[..., Any]) -> None:
    rows = [trial("constant", 1e-4, seed, 0.9) for seed in (1, 2)]
    rows += [trial("constant", 1e-3, 1, 0.6), trial("constant", 1e-3, 2, 0.9)]
    rows += [trial("constant", 3e-3, 1, 0.1), trial("constant", 3e-3, 2, None, "failed")]
    rows += [trial("linear", lr, seed, 0.7) for lr in (1e-3, 3e-3) for seed in (1, 2)]
    chosen = plan_confirmation(recorded(*rows))
    assert chosen.losses == {"linear-lr1e-3": 0.7, "constant-lr1e-3": 0.75}
    assert list(chosen.arms) == ["linear-lr1e-3", "constant-lr1e-3"]
    assert chosen.arms["linear-lr1e-3"] == {"lr_scheduler": {"type": "linear"}, "optimizer.lr": 1e-3}
    assert (chosen.name, chosen.seeds, chosen.began) == ("toy-confirm", (3, 4, 5, 6, 7), False)


def test_an_arm_that_diverged_on_a_seed_leads_nothing(recorded: Callable[..., Any]) -> None:
    rows = [trial("constant", lr, seed, 1000 * lr) for lr in (1e-4, 1e-3) for seed in (1, 2, 3)]
    rows += [trial("linear", 1e-3, seed, 0.8) for seed in (1, 2, 3)]
    rows += [{**trial("linear", 3e-3, 1, None, "stopped"), "step": 0}]  # never begun: says nothing of the arm
    rows += [trial("linear", 3e-3, seed, 0.7) for seed in (2, 3)]
    rows[2] = {**trial("constant", 1e-4, 3, None, "stopped"), "step": 10}
    assert list(plan_confirmation(recorded(*rows)).losses) == ["linear-lr3e-3", "constant-lr1e-3"]


def test_an_unfinished_sweep_has_no_leaders(recorded: Callable[..., Any]) -> None:
    rows = [trial("constant", 1e-3, 1, 0.6), trial("linear", 1e-3, 1, None, "running")]
    with pytest.raises(ConfigError, match="1 trials go on, linear-lr1e-3-seed1 first"):
        plan_confirmation(recorded(*rows))


def test_a_seed_that_chose_cannot_confirm(recorded: Callable[..., Any]) -> None:
    rows = [trial(setting, 1e-3, seed, 0.6) for setting in ("constant", "linear") for seed in (1, 2)]
    with pytest.raises(ConfigError, match="seed 2 took part in choosing"):
        plan_confirmation(recorded(*rows, section="confirm: {seeds: [2, 3]}"))


def test_the_leaders_stay_those_that_the_first_start_chose(recorded: Callable[..., Any]) -> None:
    recorded(*[trial(setting, 3e-3, 9, 0.5) for setting in ("linear", "constant")], name="toy-confirm")
    rows = [trial(setting, lr, 1, 10 * lr) for setting in ("constant", "linear") for lr in (1e-3, 3e-3)]
    config = recorded(*rows)
    kept = plan_confirmation(config)
    assert (list(kept.arms), kept.began) == (["linear-lr3e-3", "constant-lr3e-3"], True)
    anew = plan_confirmation(config, anew=True)
    assert (list(anew.arms), anew.began) == (["constant-lr1e-3", "linear-lr1e-3"], False)


def test_one_arm_has_nothing_to_be_compared_with(recorded: Callable[..., Any]) -> None:
    rows = [trial("constant", 1e-3, 1, 0.6), trial("linear", 1e-3, 1, None, "failed")]
    with pytest.raises(ConfigError, match="fit to confirm: constant-lr1e-3"):
        plan_confirmation(recorded(*rows))


def test_a_config_without_a_sweep_has_nothing_to_confirm(toy_config: Path) -> None:
    with pytest.raises(ConfigError, match="there is no `sweep` section"):
        confirm(toy_config, [])


def test_a_confirmation_trains_the_leaders_and_the_report_says_what_they_showed(
    sweep: Sweep, toy_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = f"{{{GRID}, seeds: [1], confirm: {{num_leaders: 2, seeds: [5, 6, 7]}}}}"
    done = sweep(section)
    first = (done / "report.html").read_text()
    assert "a verdict takes 3 at least" in first
    words = ["name=toy", WATCHED, f"sweep={section}"]
    confirm(toy_config, words)
    trials = json.loads((done.with_name("toy-confirm") / "sweep.json").read_text())["trials"]
    finals = {t["name"]: t["final"]["relative"] for t in json.loads((done / "sweep.json").read_text())["trials"]}
    best = [min((name for name in finals if name.startswith(kind)), key=finals.__getitem__) for kind in ("c", "l")]
    assert {t["arm"] for t in trials} == {name.removesuffix("-seed1") for name in best}
    assert {(t["seed"], t["status"]) for t in trials} == {(seed, "finished") for seed in (5, 6, 7)}
    assert len(trials) == 6
    page = (done / "report.html").read_text()
    assert "On 3 fresh paired seeds" in page
    assert "Confirmation on fresh seeds" in page

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished trial was trained again")

    monkeypatch.setattr(fit_module, "train_loop", never)
    confirm(toy_config, words)
