"""`lora-trainer schedules ...`: the part of the command line about learning-rate schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

schedules_app = typer.Typer(
    help="Learning-rate schedules: list, show options, explain, plot. Nothing is trained.", no_args_is_help=True
)
Name = Annotated[str, typer.Argument(help="A schedule's name; `lora-trainer schedules list` has them all.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Updates of the run; default 1000, or the config's.")]
LR = Annotated[float | None, typer.Option("--lr", min=0, help="Base learning rate; default 1e-4, or the config's.")]


@schedules_app.command("list")
def list_() -> None:
    """Every schedule and what it is for."""
    from lora_trainer.commands.schedules import list_schedules
    from lora_trainer.tracking.console import Screen

    Screen().table("Schedules (lr_scheduler.type)", list_schedules())


@schedules_app.command(epilog="Example:  lora-trainer schedules show cosine")
def show(name: Name) -> None:
    """The options of a schedule."""
    from lora_trainer.commands.schedules import show_options
    from lora_trainer.tracking.console import Screen

    Screen().table(f"Options of {name}", show_options(name))


@schedules_app.command(epilog="Example:  lora-trainer schedules explain rex --steps 2000 --lr 1e-4")
def explain(name: Name, steps: Steps = None, lr: LR = None) -> None:
    """Purpose, limits, formula, and what the schedule amounts to over a run."""
    from lora_trainer.commands.schedules import explain as run
    from lora_trainer.tracking.console import Screen

    Screen().table(name, run(name, steps or 1000, lr or 1e-4))


@schedules_app.command(
    epilog="Examples:  lora-trainer schedules plot -o six.png   |   "
    "lora-trainer schedules plot cosine rex warmup_steps=5% --terminal   |   "
    "lora-trainer schedules plot --config configs/demo.yaml -o plan.png"
)
def plot(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME|KEY=VALUE]...", help="Default: the six, or the config's."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Lay them over this config's run.")] = None,
    steps: Steps = None,
    lr: LR = None,
    every: Annotated[bool, typer.Option("--all", help="Every schedule.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG file to write.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw in the terminal.")] = False,
) -> None:
    """Draw the learning rate of each update before any GPU time is spent."""
    from lora_trainer.commands.schedules import plot as run

    run(names or [], config, steps, lr, every=every, output=output, terminal=terminal)
