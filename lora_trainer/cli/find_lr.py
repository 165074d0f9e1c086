"""`lora-trainer find-lr`: which base learning rate to train with, measured on the real data and base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from lora_trainer.cli.session import StopRequest, check_platform
from lora_trainer.config.load import load_config
from lora_trainer.experiments.lr_finder.prepare import FinderOptions, finder_rows, prepare_finder
from lora_trainer.experiments.lr_finder.record import answer_rows, write_result
from lora_trainer.runtime.launch import read_launch
from lora_trainer.storage import locks
from lora_trainer.tracking.console import LOADING, MainConsole


def find_lr(config_file: Path, overrides: Sequence[str], options: FinderOptions) -> None:
    """Print the plan, measure, write find_lr.json and find_lr.png beside the run's folder, and say what to use.

    Raises:
        TrainerError: whatever went wrong, with its exit code.
    """
    check_platform()
    config = load_config(config_file, overrides)
    launch = read_launch(config)
    console = MainConsole(silent=not launch.is_main)
    finder = prepare_finder(config, launch, options, console.track)
    console.table(f"Plan of find-lr for {config.name}", finder_rows(finder))
    console.print(LOADING)
    from lora_trainer.experiments.lr_finder.run import find_lr as run

    lock = locks.sole_writer(finder.folder, console.print) if launch.is_main else nullcontext()
    with lock, StopRequest().listening() as stop:
        result = run(finder, console=console, should_stop=stop)
        if launch.is_main:
            files = write_result(finder, result, console.print)
            console.table(f"Learning rate for {config.name}", answer_rows(finder, result))
            console.table("Files", [(file.name, str(file)) for file in files])
