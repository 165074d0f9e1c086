"""`lora-trainer sweep`: the short runs that choose learning rates where they are asked for, then the sweep itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lora_trainer.cli.session import StopRequest, check_platform
from lora_trainer.cli.sweep_start import SweepStart, join
from lora_trainer.config.load import load_config
from lora_trainer.config.trials import load_sweep
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.experiments.sweep.record import read_sweep
from lora_trainer.experiments.sweep.results import unfinished_trials
from lora_trainer.experiments.sweep.short_runs import plan_short_runs
from lora_trainer.runtime.launch import read_launch
from lora_trainer.storage import disk_space
from lora_trainer.tracking.console import Screen


def sweep(
    config_file: Path,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    fresh: bool = False,
    measure: bool = False,
) -> None:
    """Run a sweep to its end, or print its plan.

    Args:
        measure: add to a printed plan what a few updates of each group took.

    Raises:
        TrainerError: whatever went wrong, with its exit code; also recorded in the sweep directory's exit.json.
    """
    check_platform()
    require_section(config_file, overrides)
    config, trials = load_sweep(config_file, overrides)
    launch = read_launch(config)
    short = plan_short_runs(config, trials)
    with ExitStack() as stack:
        stack.enter_context(disk_space.faults_in_words())
        stop = stack.enter_context(StopRequest().listening())
        start = SweepStart(launch, Screen(silent=not launch.is_main), stop, dry_run, fresh, measure)
        screened: dict[str, str] = {}
        if short is not None:
            if launch.num_processes > 1 and (measure or not dry_run):
                start = replace(start, joined=stack.enter_context(join(launch)))
            start.screen.say(
                f"first: short runs of {short.num_updates} updates choose {short.keep} of the LRs of each setting"
            )
            start.run(*load_sweep(config_file, [*overrides, *short.overrides]))
            done = read_sweep(short.folder)
            screened = start.agree(short.dropped_arms(done) if done and not unfinished_trials(done) else {})
        start.run(config, trials, screened)


def require_section(config_file: Path, overrides: Sequence[str]) -> None:
    """Refuse a configuration without a `sweep` section.

    Raises:
        ConfigError: there is none.
    """
    if load_config(config_file, overrides).sweep is None:
        raise ConfigError(
            Problem(
                "there is no `sweep` section, so there are no trials to compare",
                str(config_file),
                fix="add one, as in sweep: {grid: {optimizer.lr: [1e-4, 3e-4]}} (docs/sweeps.md), or use train",
            )
        )
