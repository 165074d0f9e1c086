"""The sweep that trains another's leaders again, on seeds that took no part in choosing them. Never imports torch.

It is a sweep of its own, `<name>-confirm`, from the same configuration: the leaders become its named trials.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer.config.places import run_directory
from lora_trainer.config.schema import ConfirmConfig, RunConfig
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.verdict import leaders
from lora_trainer.experiments.sweep.record import Json, read_sweep
from lora_trainer.experiments.sweep.results import arms_of, unfinished_trials

NUM_FRESH_SEEDS = 5


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What a sweep's `--confirm` trains."""

    name: str
    arms: dict[str, dict[str, Any]]
    """Overrides of each leading arm, the best first."""
    losses: dict[str, float]
    """Their mean held-out losses in the sweep that chose them, relative to the base."""
    seeds: tuple[int, ...]
    began: bool
    """Whether an earlier start chose these leaders."""

    def overrides(self, config: RunConfig) -> list[str]:
        """What turns the sweep's configuration into that of its confirmation."""
        assert config.sweep is not None
        section = {
            "trials_per_pass": config.sweep.trials_per_pass,
            "trials": self.arms,
            "seeds": list(self.seeds),
            "prune": {"diverged": config.sweep.prune.diverged},
        }
        return [f"name={self.name}", f"sweep={json.dumps(section)}"]


def confirmation_directory(config: RunConfig) -> Path:
    """Where a sweep's confirmation lies: beside it."""
    sweep_dir = run_directory(config)
    return sweep_dir.with_name(f"{sweep_dir.name}-confirm")


def plan_confirmation(config: RunConfig, *, anew: bool = False) -> Confirmation:
    """Choose the leaders of a finished sweep, or keep those that an earlier start of its confirmation chose.

    Args:
        anew: choose again.

    Raises:
        ConfigError: the sweep is not finished, has no two arms to confirm, or a seed took part in it.
    """
    assert config.sweep is not None
    sweep_dir, folder = run_directory(config), confirmation_directory(config)
    content = _finished(sweep_dir)
    before = None if anew else read_sweep(folder)
    arms = {arm.name: arm for arm in arms_of(content)}
    if before is None:
        chosen = [arm.name for arm in leaders(list(arms.values()), config.sweep.confirm.num_leaders)]
    else:
        chosen = [name for name in dict.fromkeys(trial["arm"] for trial in before["trials"]) if name in arms]
    if len(chosen) < 2:
        found = ", ".join(chosen) or "none"
        fix = "add trials to the sweep; where other leaders were chosen before, --fresh chooses again"
        raise ConfigError(Problem("a confirmation compares two arms", str(sweep_dir), f"fit to confirm: {found}", fix))
    overrides = {trial["arm"]: trial["overrides"] for trial in content["trials"]}
    return Confirmation(
        folder.name,
        {name: overrides[name] for name in chosen},
        {name: arms[name].mean_loss for name in chosen},
        _fresh_seeds(config.sweep.confirm, {trial["seed"] for trial in content["trials"]}),
        before is not None,
    )


def _finished(sweep_dir: Path) -> Json:
    content = read_sweep(sweep_dir)
    if content is None or (waiting := unfinished_trials(content)):
        why = "it was never started" if content is None else f"{len(waiting)} trials go on, {waiting[0]} first"
        fix = "run the same command without --confirm to its end"
        raise ConfigError(Problem("only a finished sweep has leaders", str(sweep_dir), why, fix))
    return content


def _fresh_seeds(config: ConfirmConfig, used: set[int]) -> tuple[int, ...]:
    if config.seeds is None:
        return tuple(range(max(used) + 1, max(used) + 1 + NUM_FRESH_SEEDS))
    if stale := sorted({*config.seeds} & used):
        raise ConfigError(
            Problem(
                f"seed {', '.join(map(str, stale))} took part in choosing, so it cannot confirm",
                "sweep.confirm.seeds",
                fix="write other seeds, or remove the key",
            )
        )
    return config.seeds
