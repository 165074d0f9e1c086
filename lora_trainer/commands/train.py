"""`lora-trainer train`: plan, train, say where everything is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lora_trainer import atomicio, disk
from lora_trainer.commands.session import StopRequest, check_platform, record_exit, set_aside
from lora_trainer.config.load import load_config
from lora_trainer.config.places import run_directory
from lora_trainer.errors import ExitCode, TrainerError
from lora_trainer.launch import read_launch
from lora_trainer.prepare import Prepared, plan_rows, prepare
from lora_trainer.tracking.console import Screen


def train(config_file: Path, overrides: Sequence[str], *, dry_run: bool = False, fresh: bool = False) -> None:
    """Run one training, or the sweep that the config describes, to its end, or print its plan.

    Raises:
        TrainerError: whatever went wrong, with its exit code; also recorded in the run directory's exit.json.
    """
    check_platform()
    config = load_config(config_file, overrides)
    if config.sweep is not None:
        from lora_trainer.commands.sweep import sweep

        sweep(config_file, overrides, dry_run=dry_run, fresh=fresh)
        return
    launch = read_launch(config)
    screen = Screen(silent=not launch.is_main)
    run_dir = run_directory(config)
    with ExitStack() as stack:
        stack.enter_context(disk.faults_in_words())
        stop = stack.enter_context(StopRequest().listening())
        if launch.is_main and not dry_run:
            stack.enter_context(atomicio.sole_writer(run_dir, screen.say))
            if fresh:
                set_aside(run_dir, screen)
        try:
            with disk.faults_in_words():
                prepared = prepare(config, launch, screen.track)
                screen.table(f"Plan of {config.name}", plan_rows(prepared))
                if not dry_run:
                    _train(prepared, screen, stop)
        except TrainerError as error:
            if launch.is_main and not dry_run:
                record_exit(run_dir, error.exit_code, error.title, str(error.problems[0].what))
            raise


def _train(prepared: Prepared, screen: Screen, stop: StopRequest) -> None:
    from lora_trainer.fit import fit
    from lora_trainer.trial import TrialSpec

    result = fit(prepared, [TrialSpec(prepared.config.name, prepared.config)], screen=screen, should_stop=stop)
    if prepared.launch.is_main:
        record_exit(prepared.run_dir, ExitCode.DONE, "finished", f"{result.step} updates")
    screen.table("Done", [(file.name, str(file)) for file in result.files])
