"""Options and arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _above_zero(lr: float | None) -> float | None:
    if lr is not None and not 0 < lr < float("inf"):
        raise typer.BadParameter("a learning rate is above 0")
    return lr


def one_file(files: list[Path] | None) -> list[Path] | None:
    if files and len(files) > 1:
        raise typer.BadParameter("one configuration file; what differs is written behind it as key.path=value")
    return files


ConfigFile = Annotated[
    list[Path],
    typer.Option("--config", "-c", metavar="FILE", callback=one_file, help="YAML configuration (docs/config.md)."),
]
Overrides = Annotated[
    list[str],
    typer.Argument(default_factory=list, metavar="[KEY.PATH=VALUE]...", help="Replace settings.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")]
Measure = Annotated[bool, typer.Option("--measure", help="With --dry-run: time a few updates, and their memory.")]
Name = Annotated[str, typer.Argument(help="A schedule's name; `lora-trainer schedules list` has them all.")]
Words = Annotated[list[str], typer.Argument(metavar="NAME [KEY=VALUE]...", help="A schedule, and options for it.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Updates of the run; default 1000, or the config's.")]
LR = Annotated[
    float | None, typer.Option("--lr", callback=_above_zero, help="Base learning rate; default 1e-4, or the config's.")
]
Epoch = Annotated[
    int | None,
    typer.Option("--epoch-steps", min=1, help="Updates of an epoch; default a tenth of the run, or the config's."),
]


def _allow_plugins(allowed: bool) -> bool:
    from lora_trainer.schedules.registry import allow_plugins

    allow_plugins(allowed)
    return allowed


Plugins = Annotated[
    bool,
    typer.Option("--allow-plugins", callback=_allow_plugins, help="Run code that the config names by its path."),
]
