"""Options and arguments that several commands take."""

from __future__ import annotations

import math
import sys
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lora_trainer.errors import ConfigError, Problem


def _above_zero(lr: float | None) -> float | None:
    if lr is not None and not 0 < lr < float("inf"):
        raise typer.BadParameter("a learning rate is above 0")
    return lr


def finite(number: float) -> float:
    if not math.isfinite(number):
        raise typer.BadParameter("a finite number is expected")
    return number


def one_file(files: list[Path] | None) -> list[Path] | None:
    if files and len(files) > 1:
        raise typer.BadParameter("one configuration file; what differs is written behind it as key.path=value")
    return files


class Program(TyperGroup):
    """Commands; what the words behind one were meant to be is said where it is plain."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse a setting written as an option, and a configuration without `-c`.

        Raises:
            ConfigError: with the words to write.
        """
        command = self.commands.get(args[0]) if args else None
        options = {name: parameter for parameter in getattr(command, "params", ()) for name in parameter.opts}
        if "--config" in options:
            _check_words(args[1:], {*options, "-h", "--help"})
        return super().parse_args(ctx, args)


def _check_words(words: list[str], options: Container[str]) -> None:
    from lora_trainer.config.load import setting_called

    for word, following in zip(words, [*words[1:], "--"], strict=True):
        name, equals, value = word.partition("=")
        key = setting_called(name.lstrip("-")) if word.startswith("--") and name not in options else None
        if key is not None:
            value = value if equals or following.startswith("-") else following
            key, _, meant = key.partition(": ")
            what = f"`{name}` is no option: settings are written without dashes"
            raise ConfigError(Problem(what, "command line", fix=f"write {key}={meant or value or 'VALUE'}"))
    files = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    if files and not any(word.startswith(("-c", "--config")) for word in words):
        raise ConfigError(Problem("no configuration is named", "command line", fix=f"write -c {files[0]}"))


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
Steps = Annotated[int | None, typer.Option("--steps", min=1, max=10**6, help="Updates; default 1000, or the config's.")]
LR = Annotated[
    float | None, typer.Option("--lr", callback=_above_zero, help="Base learning rate; default 1e-4, or the config's.")
]
Epoch = Annotated[
    int | None,
    typer.Option("--epoch-steps", min=1, max=10**6, help="Updates of an epoch; default a tenth, or the config's."),
]


def _allow_plugins(allowed: bool) -> bool:
    from lora_trainer.schedules.registry import allow_plugins

    allow_plugins(allowed)
    if allowed and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as `python -m` has it, for schedules that lie here
    return allowed


Plugins = Annotated[
    bool,
    typer.Option("--allow-plugins", callback=_allow_plugins, help="Run code that the config names by its path."),
]
