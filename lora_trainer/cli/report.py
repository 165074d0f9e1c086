"""`lora-trainer report`: the page about a run, or about several compared, built anew from their directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.verdict import Rules
from lora_trainer.report.page import GENERATOR, write_report
from lora_trainer.tracking.console import Screen


def report(runs: Sequence[Path], output: Path | None, min_effect: float, confirm: Sequence[Path] = ()) -> None:
    """Write the page and say its sentence; of one run into its directory, of several where we are.

    Args:
        confirm: runs of the leaders on fresh seeds.

    Raises:
        ConfigError: a folder is no run directory, runs do not go together, or the page would replace another's file.
    """
    chosen = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    _refuse_to_replace(chosen)
    sentence = write_report(runs, chosen, confirm=confirm, rules=Rules(min_effect=min_effect))
    screen = Screen()
    screen.say(sentence)
    screen.say(f"\nwrote {chosen}")


def _refuse_to_replace(file: Path) -> None:
    if file.is_file() and GENERATOR not in file.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(
            Problem("a file that is no report of ours is in the way", str(file), fix="name another with --output")
        )
