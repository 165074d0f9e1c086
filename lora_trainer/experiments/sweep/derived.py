"""Sweeps that a sweep calls for, from the same configuration, in folders beside its own. Never imports torch.

`sweep.prune.short_runs`: before it, complete short runs (`<name>-short`) choose each setting's learning rates. Only
learning rates of one and the same setting are compared, each under its whole schedule laid over the short run: never
different schedules, and never a curve that was cut off.

`--confirm`: after it, its leaders become the named trials of `<name>-confirm`, on seeds that took no part in choosing
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_trainer.config.places import run_directory
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.sweep_schema import ConfirmConfig
from lora_trainer.config.trials import TrialConfig
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.verdict import by_setting, leaders, ranked
from lora_trainer.experiments.sweep.record import Json, arms_of, read_sweep, unfinished_trials
from lora_trainer.planning.run_plan import resolve_param_groups
from lora_trainer.schedules.schedule import Horizon, to_steps

SHORT_RUNS = "sweep.prune.short_runs"
LENGTHS = ("train", "train.max_steps", "train.epochs")
SHRINKS = 0.01
"""Difference of two curves' areas, in units of peak x length, below which the short one counts as the long one's."""
NUM_FRESH_SEEDS = 5


def _overrides(config: RunConfig, name: str, arms: Mapping[str, Any], seeds: Sequence[int]) -> tuple[str, ...]:
    """What turns a sweep's configuration into that of another with these arms and seeds."""
    assert config.sweep is not None
    section = {
        "trials_per_pass": config.sweep.trials_per_pass,
        "trials": arms,
        "seeds": seeds,
        "prune": {"diverged": config.sweep.prune.diverged},
    }
    return f"name={name}", f"sweep={json.dumps(section)}"


@dataclass(frozen=True, slots=True)
class ShortRuns:
    """The sweep that comes first."""

    folder: Path
    num_steps: int
    seed: int
    keep: int
    overrides: tuple[str, ...]
    """What turns the sweep's configuration into that of its short runs."""

    def dropped_arms(self, content: Json) -> dict[str, str]:
        """The arms whose LR did not come through, with the reason, from the record of the finished short runs."""
        reasons = {}
        for arms in by_setting(arms_of(content)).values():
            best, *_ = chosen = ranked(arms)[: self.keep]
            for arm in arms:
                if arm not in chosen:
                    got = f"held-out loss {arm.mean_loss:.4f}" if arm.losses else "no result"
                    reasons[arm.name] = (
                        f"{SHORT_RUNS}: {got} after a complete run of {self.num_steps} updates on seed {self.seed}, "
                        f"{best.mean_loss:.4f} at LR {best.peak_lr:.3g}"
                    )
        return reasons


def plan_short_runs(config: RunConfig, trials: Sequence[TrialConfig]) -> ShortRuns | None:
    """The short runs of a sweep; None where it asks for none.

    Raises:
        ConfigError: lengths are not in updates of the whole sweep, or a schedule does not shrink with the run.
    """
    assert config.sweep is not None
    rule = config.sweep.prune.short_runs
    if rule is None:
        return None
    whole = config.train.max_steps
    unequal = sorted({trial.arm for trial in trials if any(key in LENGTHS for key in trial.overrides)})
    if whole is None or unequal:
        what = f"length of {', '.join(unequal)}" if unequal else "number of epochs"
        fix = "set train.max_steps for all trials, or remove short_runs"
        raise ConfigError(
            Problem(f"short runs are a share of one length for all, not of the {what}", SHORT_RUNS, fix=fix)
        )
    length, seed = to_steps(rule.length, Horizon(whole, 1)), trials[0].seed
    first = [trial for trial in trials if trial.seed == seed]
    _check_shrinking(first, whole, length)
    folder = run_directory(config).with_name(f"{config.name}-short")
    overrides = _overrides(config, folder.name, {trial.arm: dict(trial.overrides) for trial in first}, [seed])
    return ShortRuns(folder, length, seed, rule.keep, (f"train.max_steps={length}", *overrides))


def _check_shrinking(trials: Sequence[TrialConfig], whole: int, length: int) -> None:
    """A curve over the short run must be the long one's in small: lengths in percent are, those in updates are not."""
    problems = [
        Problem(
            f"the LR curve of `{trial.arm}` does not shrink with a run of {length} updates",
            SHORT_RUNS,
            "so its short run says little of its long one",
            'write its lengths as shares of the run, as in warmup_steps: "5%"',
        )
        for trial in trials
        if _gap(trial.config, whole, length) > SHRINKS + 2 / length
    ]
    if problems:
        raise ConfigError(*problems)


def _gap(config: RunConfig, whole: int, length: int) -> float:
    """The largest difference of two curves' areas at any moment of the run; infinite where the short one is none."""
    try:
        one, other = (_areas(config, Horizon(updates, max(1, updates // 10))) for updates in (whole, length))
    except ConfigError:
        return math.inf
    return float(np.abs(one - other).max(initial=0.0))


def _areas(config: RunConfig, horizon: Horizon) -> np.ndarray:
    """Area under each LR group's curve up to moments of the run [groups, moments]; none where one waits for probes."""
    groups = resolve_param_groups(config, horizon, "denoiser")
    if any(group.schedule.feedback is not None for group in groups):
        return np.empty(0)
    moments, ends = np.linspace(0, 1, 101), np.linspace(0, 1, horizon.num_steps + 1)
    multipliers = [[0.0, *(group.lr(k) / group.base_lr for k in range(horizon.num_steps))] for group in groups]
    return np.array([np.interp(moments, ends, np.cumsum(row) / horizon.num_steps) for row in multipliers])


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
    overrides: tuple[str, ...]
    """What turns the sweep's configuration into that of its confirmation."""


def confirmation_directory(config: RunConfig) -> Path:
    """Where a sweep's confirmation lies: beside it."""
    return run_directory(config).with_name(f"{config.name}-confirm")


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
        fit = f"fit to confirm: {', '.join(chosen) or 'none'}"
        fix = "add trials to the sweep; where other leaders were chosen before, --fresh chooses again"
        raise ConfigError(Problem("a confirmation compares two arms", str(sweep_dir), fit, fix))
    of_arm = {trial["arm"]: trial["overrides"] for trial in content["trials"]}
    leading = {name: of_arm[name] for name in chosen}
    seeds = _fresh_seeds(config.sweep.confirm, {trial["seed"] for trial in content["trials"]})
    losses = {name: arms[name].mean_loss for name in chosen}
    overrides = _overrides(config, folder.name, leading, seeds)
    return Confirmation(folder.name, leading, losses, seeds, before is not None, overrides)


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
        what = f"seed {', '.join(map(str, stale))} took part in choosing, so it cannot confirm"
        raise ConfigError(Problem(what, "sweep.confirm.seeds", fix="write other seeds, or remove the key"))
    return config.seeds
