"""`lora-trainer sweep --status`: where a sweep stands, from its files alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_trainer.config.load import load_config
from lora_trainer.config.places import run_directory
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.paired import levels
from lora_trainer.experiments.sweep.confirmation import confirmation_directory
from lora_trainer.experiments.sweep.record import ENDED, Json, read_sweep, refreshed
from lora_trainer.tracking.console import Screen


def show_status(config_file: Path, overrides: Sequence[str], *, confirmation: bool = False) -> None:
    """Say where a sweep stands, or its confirmation, from its files alone.

    Raises:
        ConfigError: it was never started.
    """
    config = load_config(config_file, overrides)
    sweep_dir = confirmation_directory(config) if confirmation else run_directory(config)
    content = read_sweep(sweep_dir)
    if content is None:
        raise ConfigError(Problem("no sweep has been started here", str(sweep_dir), fix="start it without --status"))
    now = refreshed(content, sweep_dir)
    screen = Screen()
    ended = sum(trial["status"] in ENDED for trial in now["trials"])
    screen.table(
        f"{now['name']}: {ended} of {len(now['trials'])} trials ended",
        [
            (g["name"], f"{g['status']}, update {g['step']} of {g['num_updates']}, {len(g['trials'])} trials")
            for g in now["groups"]
        ],
    )
    screen.table("Trials, the best so far first", result_rows(now))


def result_rows(content: Json) -> Iterator[tuple[str, str]]:
    """Trials by their last held-out loss, or their smallest while they are trained, relative to the base's.

    Those of equal loss stand in the order of the sweep.
    """

    def place(trial: Json) -> float:
        probe = trial["final"] or trial["best"]
        return probe["relative"] if probe else float("inf")

    level = levels(map(place, content["trials"]))
    for trial in sorted(content["trials"], key=lambda trial: level[place(trial)]):
        words = [f"{trial['status']} at {trial['step']}/{trial['num_updates']}"]
        probes = [(name, trial[name]) for name in ("final", "best") if trial[name] is not None]
        words += [f"{name} {probe['relative']:.4f} (step {probe['step']})" for name, probe in probes]
        if trial["reason"]:
            words.append(trial["reason"])
        yield trial["name"], ", ".join(words)
