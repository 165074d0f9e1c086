"""The commands of `lora-trainer schedules`; each imports what it needs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_trainer.cli.options import LR, Epoch, Name, Plugins, Steps, Words, one_file

app = typer.Typer(
    help="Learning-rate schedules: list, show options, explain, plot. Nothing is trained.", no_args_is_help=True
)


@app.command("list")
def list_schedules() -> None:
    """Every schedule and what it is for."""
    from lora_trainer.cli.schedules import list_schedules as rows
    from lora_trainer.tracking.console import MainConsole

    MainConsole().table("Schedules (lr_scheduler.type)", rows())


@app.command(epilog="Example:  lora-trainer schedules show cosine")
def show(name: Name) -> None:
    """The options of a schedule."""
    from lora_trainer.cli.schedules import show_options
    from lora_trainer.tracking.console import MainConsole

    MainConsole().table(f"Options of {name}", show_options(name))


@app.command(
    epilog="Examples:  lora-trainer schedules explain rex --steps 2000 --lr 1e-4   |   "
    "lora-trainer schedules explain exponential gamma=0.9 --epoch-steps 25"
)
def explain(words: Words, steps: Steps = None, lr: LR = None, epoch: Epoch = None, _plugins: Plugins = False) -> None:
    """Purpose, limits, formula, and what the schedule amounts to over a run."""
    from lora_trainer.cli.schedules import DEFAULT_LR, example_horizon
    from lora_trainer.cli.schedules import explain as run
    from lora_trainer.tracking.console import MainConsole

    rows = list(run(words, example_horizon(steps, epoch), DEFAULT_LR if lr is None else lr))
    MainConsole().table(" ".join(words), rows)


@app.command(
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
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", metavar="FILE", callback=one_file, help="Lay them over this config's run."),
    ] = None,
    steps: Steps = None,
    lr: LR = None,
    epoch: Epoch = None,
    _plugins: Plugins = False,
    every: Annotated[bool, typer.Option("--all", help="Every schedule but `torch`.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG file to write.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw in the terminal.")] = False,
) -> None:
    """Draw the learning rate of each update before any GPU time is spent."""
    from lora_trainer.cli.schedules import plot as run

    run(names or [], config[0] if config else None, steps, lr, epoch, every=every, output=output, terminal=terminal)
