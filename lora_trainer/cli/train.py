"""`lora-trainer train`: plan, train, say where everything is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lora_trainer.cli.session import StopRequest, check_platform, record_exit, set_aside
from lora_trainer.config.load import load_config
from lora_trainer.config.places import CURVES_FILE, METRICS_FILE, report_file, run_directory
from lora_trainer.errors import ExitCode, NumericStop, Problem, TrainerError
from lora_trainer.planning.prepare import Prepared, files_to_come, plan_rows, prepare
from lora_trainer.report.page import write_report
from lora_trainer.report.pictures import draw_curves
from lora_trainer.runtime.launch import Launch, read_launch
from lora_trainer.storage import atomic_files, disk_space
from lora_trainer.tracking.console import Screen


def train(config_file: Path, overrides: Sequence[str], *, dry_run: bool = False, fresh: bool = False) -> None:
    """Run one training, or the sweep that the config describes, to its end, or print its plan.

    Raises:
        TrainerError: whatever went wrong, with its exit code; also recorded in the run directory's exit.json.
    """
    check_platform()
    config = load_config(config_file, overrides)
    if config.sweep is not None:
        from lora_trainer.cli.sweep import sweep

        sweep(config_file, overrides, dry_run=dry_run, fresh=fresh)
        return
    launch = read_launch(config)
    screen = Screen(silent=not launch.is_main)
    run_dir = run_directory(config)
    with ExitStack() as stack:
        stack.enter_context(disk_space.faults_in_words())
        stop = stack.enter_context(StopRequest().listening())
        if launch.is_main and not dry_run:
            stack.enter_context(atomic_files.sole_writer(run_dir, screen.say))
            if fresh:
                set_aside(run_dir, screen)
        try:
            with disk_space.faults_in_words():
                prepared = prepare(config, launch, screen.track)
                screen.table(f"Plan of {config.name}", plan_rows(prepared))
                if not dry_run:
                    _train(prepared, launch, screen, stop)
        except TrainerError as error:
            if launch.is_main and not dry_run:
                record_exit(run_dir, error.exit_code, error.title, str(error.problems[0].what))
            raise


def _train(prepared: Prepared, launch: Launch, screen: Screen, stop: StopRequest) -> None:
    from lora_trainer.training.fit import fit
    from lora_trainer.training.group import solo_group

    name, run_dir = prepared.config.name, prepared.run_dir
    result = fit(solo_group(prepared), screen=screen, should_stop=stop)
    if (ending := result.endings[name]) is not None:
        raise NumericStop(
            Problem(
                f"training stopped after step {ending.step}, which is saved: {ending.reason}",
                str(run_dir),
                fix="lower optimizer.lr (a tenth), use bf16 or fp32, look at the images named; the run goes on "
                "with the change and 'resume.allow_changes=[optimizer.lr]' (the key that you changed)",
            )
        )
    if result.was_finished:
        screen.say("this run is finished; nothing to do")
    if launch.is_main:
        record_exit(run_dir, ExitCode.DONE, "finished", f"{result.step} updates")  # the report tells of it
        if not (result.was_finished and report_file(prepared.config).is_file()):
            draw_curves(run_dir / METRICS_FILE, run_dir / CURVES_FILE, name)
            write_report([run_dir], report_file(prepared.config))
    screen.table("Done", [(file.name, str(file)) for file in files_to_come(prepared.config)])
