"""`lora-trainer check`: is everything that a run needs there and sound? Nothing is trained or written but the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_trainer.cli.session import check_platform
from lora_trainer.config.load import load_config
from lora_trainer.planning.prepare import Prepared, prepare
from lora_trainer.runtime.launch import read_launch
from lora_trainer.tracking.console import Screen


def check(config_file: Path, overrides: Sequence[str], *, config_only: bool = False) -> None:
    """Say that the configuration, and unless `config_only` the base and every image and caption, can be used.

    Raises:
        TrainerError: they cannot; with all problems of the first kind that has any.
    """
    check_platform()
    config = load_config(config_file, overrides)
    screen = Screen()
    screen.say(f"configuration  {config_file} can be used")
    if config_only:
        return
    prepared = prepare(config, read_launch(config), screen.track)
    for name, said in _findings(prepared):
        screen.say(f"{name:<15}{said}")


def _findings(prepared: Prepared) -> list[tuple[str, str]]:
    plan, base = prepared.plan, prepared.base
    warnings = [("warning", warning) for group in plan.lr_groups for warning in group.warnings]
    notes = [("", note) for note in prepared.dataset.notes]
    return [
        ("base", f"{base.path} is a whole {base.family} folder, {prepared.prediction_type} prediction"),
        ("images", f"{plan.num_images} can be read and have their captions"),
        *notes,
        ("targets", f"{plan.num_modules} layers get an adapter"),
        *warnings,
    ]
