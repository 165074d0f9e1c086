"""`lora-trainer schedules ...`: the part of the command line about learning-rate schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _above_zero(lr: float | None) -> float | None:
    if lr is not None and not 0 < lr < float("inf"):
        raise typer.BadParameter("a learning rate is above 0")
    return lr


schedules_app = typer.Typer(
    help="Learning-rate schedules: list, show options, explain, plot. Nothing is trained.", no_args_is_help=True
)
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


@schedules_app.command("list")
def list_() -> None:
    """Every schedule and what it is for."""
    from lora_trainer.cli.schedules import list_schedules
    from lora_trainer.tracking.console import Screen

    Screen().table("Schedules (lr_scheduler.type)", list_schedules())


@schedules_app.command(epilog="Example:  lora-trainer schedules show cosine")
def show(name: Name) -> None:
    """The options of a schedule."""
    from lora_trainer.cli.schedules import show_options
    from lora_trainer.tracking.console import Screen

    Screen().table(f"Options of {name}", show_options(name))


@schedules_app.command(
    epilog="Examples:  lora-trainer schedules explain rex --steps 2000 --lr 1e-4   |   "
    "lora-trainer schedules explain exponential gamma=0.9 --epoch-steps 25"
)
def explain(words: Words, steps: Steps = None, lr: LR = None, epoch: Epoch = None) -> None:
    """Purpose, limits, formula, and what the schedule amounts to over a run."""
    from lora_trainer.cli.schedules import DEFAULT_LR, example_horizon
    from lora_trainer.cli.schedules import explain as run
    from lora_trainer.tracking.console import Screen

    rows = list(run(words, example_horizon(steps, epoch), DEFAULT_LR if lr is None else lr))
    Screen().table(" ".join(words), rows)


@schedules_app.command(
    epilog="Examples:  lora-trainer schedules plot -o six.png   |   "
    "lora-trainer schedules plot cosine rex warmup_steps=5% --terminal   |   "
    "lora-trainer schedules plot --config configs/demo.yaml optimizer.lr=1e-3 -o plan.png"
)
def plot(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME|KEY=VALUE]...",
            help="Schedules, and options for them; default: the six. With --config and no name: its overrides.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Lay them over this config's run.")] = None,
    steps: Steps = None,
    lr: LR = None,
    epoch: Epoch = None,
    every: Annotated[bool, typer.Option("--all", help="Every schedule but `torch`.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG file to write.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw in the terminal.")] = False,
) -> None:
    """Draw the learning rate of each update before any GPU time is spent."""
    from lora_trainer.cli.schedules import plot as run

    run(names or [], config, steps, lr, epoch, every=every, output=output, terminal=terminal)
