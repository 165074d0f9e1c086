"""`lora-trainer sweep --confirm`: the leaders of a finished sweep again, on fresh seeds; one report over both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_trainer.cli.sweep import require_section, sweep
from lora_trainer.cli.sweep_start import REPORT
from lora_trainer.config.places import run_directory
from lora_trainer.config.trials import load_sweep
from lora_trainer.experiments.sweep.confirmation import Confirmation, confirmation_directory, plan_confirmation
from lora_trainer.report.page import write_report
from lora_trainer.runtime.launch import read_launch
from lora_trainer.tracking.console import Screen


def confirm(
    config_file: Path,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    fresh: bool = False,
    measure: bool = False,
) -> None:
    """Choose the leaders, run the sweep that confirms them, and write the report of the sweep anew with its answer.

    Raises:
        TrainerError: the sweep is not finished, or whatever `sweep` raises.
    """
    require_section(config_file, overrides)
    config, _ = load_sweep(config_file, overrides)
    launch = read_launch(config)
    screen = Screen(silent=not launch.is_main)
    chosen = plan_confirmation(config, anew=fresh)
    screen.table("Leaders, as an earlier start chose them" if chosen.began else "Leaders", _rows(chosen))
    sweep(
        config_file,
        [*overrides, *chosen.overrides(config)],
        dry_run=dry_run,
        fresh=fresh,
        measure=measure,
    )
    if launch.is_main and not dry_run:
        page = run_directory(config) / REPORT
        sentence = write_report([page.parent], page, confirm=[confirmation_directory(config)])
        screen.say(f"\n{sentence}\nreport: {page}")


def _rows(chosen: Confirmation) -> list[tuple[str, str]]:
    rows = [(arm, f"held-out loss {loss:.4f} of the base's, mean of its seeds") for arm, loss in chosen.losses.items()]
    return [*rows, ("fresh seeds", ", ".join(map(str, chosen.seeds)))]
