"""`sweep.prune.short_runs`: complete short runs choose each setting's learning rates before the sweep. Never torch.

They are a sweep of their own, `<name>-short`, from the same configuration with fewer updates. Only learning rates of
one and the same setting are compared, each under its whole schedule laid over the short run: never different schedules,
and never a curve that was cut off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_trainer.config.places import run_directory
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.trials import TrialConfig
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.verdict import by_setting, ranked
from lora_trainer.experiments.sweep.record import Json
from lora_trainer.experiments.sweep.results import arms_of
from lora_trainer.planning.run_plan import lay_groups
from lora_trainer.schedules.schedule import Horizon, to_updates

RULE = "sweep.prune.short_runs"
LENGTHS = ("train", "train.max_steps", "train.epochs")
SHRINKS = 0.01
"""Difference of two curves' areas, in units of peak x length, below which the short one counts as the long one's."""


@dataclass(frozen=True, slots=True)
class ShortRuns:
    """The sweep that comes first."""

    folder: Path
    num_updates: int
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
                        f"{RULE}: {got} after a complete run of {self.num_updates} updates on seed {self.seed}, "
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
    own = sorted({trial.arm for trial in trials if any(key in LENGTHS for key in trial.overrides)})
    if whole is None or own:
        what = f"length of {', '.join(own)}" if own else "number of epochs"
        fix = "set train.max_steps for all trials, or remove short_runs"
        raise ConfigError(Problem(f"short runs are a share of one length for all, not of the {what}", RULE, fix=fix))
    length, seed = to_updates(rule.length, Horizon(whole, 1)), trials[0].seed
    first = [trial for trial in trials if trial.seed == seed]
    _check_shrinking(first, whole, length)
    folder = run_directory(config).with_name(f"{config.name}-short")
    section = {
        "trials_per_pass": config.sweep.trials_per_pass,
        "trials": {trial.arm: dict(trial.overrides) for trial in first},
        "seeds": [seed],
        "prune": {"diverged": config.sweep.prune.diverged},
    }
    words = (f"name={folder.name}", f"train.max_steps={length}", f"sweep={json.dumps(section)}")
    return ShortRuns(folder, length, seed, rule.keep, words)


def _check_shrinking(trials: Sequence[TrialConfig], whole: int, length: int) -> None:
    """A curve over the short run must be the long one's in small: lengths in percent are, those in updates are not."""
    problems = [
        Problem(
            f"the LR curve of `{trial.arm}` does not shrink with a run of {length} updates",
            RULE,
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
        curves = [_areas(config, Horizon(updates, max(1, updates // 10))) for updates in (whole, length)]
    except ConfigError:
        return math.inf
    return max((float(np.abs(one - other).max()) for one, other in zip(*curves, strict=True)), default=0.0)


def _areas(config: RunConfig, horizon: Horizon) -> list[Any]:
    """Of each LR group: the area under its curve up to 100 moments of the run; empty where it waits for a probe."""
    groups = lay_groups(config, horizon, "denoiser")
    if any(group.schedule.feedback is not None for group in groups):
        return []
    moments = np.linspace(0, 1, 101)
    areas = []
    for group in groups:
        lrs = [group.lr(k) / group.base_lr for k in range(horizon.num_updates)]
        areas.append(np.interp(moments, np.linspace(0, 1, len(lrs) + 1), np.cumsum([0.0, *lrs]) / len(lrs)))
    return areas
