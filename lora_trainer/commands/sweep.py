"""`lora-trainer sweep`: plan, train every group, keep `sweep.json` up to date; `--status` reads it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from lora_trainer import atomicio, disk
from lora_trainer.commands.session import StopRequest, check_platform, record_exit, set_aside
from lora_trainer.config.load import load_config, to_yaml
from lora_trainer.config.places import run_directory
from lora_trainer.config.trials import load_sweep
from lora_trainer.errors import ConfigError, ExitCode, Problem, TrainerError
from lora_trainer.launch import Launch, read_launch
from lora_trainer.plan import lay_groups
from lora_trainer.report.page import write_report
from lora_trainer.report.schedule_plot import Curve, draw_schedules, terminal_plot
from lora_trainer.sweep.confirmation import confirmation_directory
from lora_trainer.sweep.fewer_seeds import trials_to_drop, without_dropped
from lora_trainer.sweep.groups import TrialGroup, without
from lora_trainer.sweep.placement import Local
from lora_trainer.sweep.prepare import PreparedSweep, prepare_sweep, sweep_rows
from lora_trainer.sweep.record import ENDED, Json, describe_sweep, read_sweep, refreshed, write_sweep
from lora_trainer.tracking.console import Screen

CURVES, REPORT = "lr-curves.png", "report.html"


def sweep(
    config_file: Path,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    fresh: bool = False,
    measure: bool = False,
) -> None:
    """Run a sweep to its end, or print its plan.

    Args:
        measure: add to a printed plan what a few updates of each group took.

    Raises:
        TrainerError: whatever went wrong, with its exit code; also recorded in the sweep directory's exit.json.
    """
    check_platform()
    _require_section(config_file, overrides)
    config, trials = load_sweep(config_file, overrides)
    launch = read_launch(config)
    screen = Screen(silent=not launch.is_main)
    sweep_dir = run_directory(config)
    with ExitStack() as stack:
        stack.enter_context(disk.faults_in_words())
        stop = stack.enter_context(StopRequest().listening())
        if launch.is_main and not dry_run:
            stack.enter_context(atomicio.sole_writer(sweep_dir))
            if fresh:
                set_aside(sweep_dir, screen)
        try:
            with disk.faults_in_words():
                prepared = prepare_sweep(config, trials, launch, screen.track)
                screen.table(f"Plan of {config.name}", sweep_rows(prepared))
                if dry_run:
                    _show_curves(prepared, screen)
                    if measure:
                        screen.table("Measured on this machine", list(_measured_rows(prepared, screen, launch)))
                else:
                    _train(prepared, screen, stop, launch)
        except TrainerError as error:
            if launch.is_main and not dry_run:
                record_exit(sweep_dir, error.exit_code, error.title, str(error.problems[0].what))
            raise


def _require_section(config_file: Path, overrides: Sequence[str]) -> None:
    if load_config(config_file, overrides).sweep is None:
        raise ConfigError(
            Problem(
                "there is no `sweep` section, so there are no trials to compare",
                str(config_file),
                fix="add one, as in sweep: {grid: {optimizer.lr: [1e-4, 3e-4]}} (docs/sweeps.md), or use train",
            )
        )


def _train(prepared: PreparedSweep, screen: Screen, stop: StopRequest, launch: Launch) -> None:
    from lora_trainer.fit_group import fit_group
    from lora_trainer.runtime import from_main, joined_processes

    sweep_dir, finished = prepared.sweep_dir, list[str]()
    record = describe_sweep(prepared.config.name, prepared.groups, prepared.before)

    def save() -> None:
        if launch.is_main:
            write_sweep(sweep_dir, refreshed(record, sweep_dir, finished))

    if launch.is_main:
        atomicio.write_file(sweep_dir / "config.yaml", to_yaml(prepared.config).encode())
        if prepared.groups:
            draw_schedules(_curves(prepared.groups), sweep_dir / CURVES, title=prepared.config.name)
    save()

    def train(planned: TrialGroup) -> None:
        nonlocal record
        dropped = from_main(launch, trials_to_drop(planned, refreshed(record, sweep_dir, finished)))
        record = without_dropped(record, dropped)
        screen.say(f"\ngroup {planned.name}: {len(planned.members) - len(dropped)} trials")
        for name, reason in dropped.items():
            screen.say(f"{name} is not trained: {reason}")
        save()
        if (group := without(planned, dropped)) is not None:
            fit_group(group, screen=screen, should_stop=stop, on_save=save, joined=joined)

    with joined_processes(launch) as joined:
        for group in Local().run(prepared.groups, train):
            finished.append(group.name)
            save()
    if launch.is_main:
        sentence = write_report([sweep_dir], sweep_dir / REPORT)
        record_exit(sweep_dir, ExitCode.DONE, "finished", f"{len(record['trials'])} trials")
        screen.table("Done", _result_rows(refreshed(record, sweep_dir, finished)))
        screen.say(f"\n{sentence}\nresults: {sweep_dir / 'sweep.json'}\nreport: {sweep_dir / REPORT}")


def _measured_rows(prepared: PreparedSweep, screen: Screen, launch: Launch) -> Iterator[tuple[str, str]]:
    """Time and memory of each group, by a few updates of it."""
    from lora_trainer.fit_group import estimate
    from lora_trainer.runtime import joined_processes

    with joined_processes(launch) as joined:
        measured = [(group, estimate(group, screen=screen, joined=joined)) for group in prepared.groups]
    seconds = 0.0
    for group, found in measured:
        seconds += found.seconds
        each = f"activations of {disk.mib(found.activation_bytes)} per trial"
        peak = f"peak memory {found.peak_memory_gib:.1f} GiB"
        yield group.name, f"{found.trials_per_pass} trials per pass, {each}, {peak}, {_duration(found.seconds)}"
    yield "in all", f"{_duration(seconds)}, without exports and samples"


def _duration(seconds: float) -> str:
    return f"about {timedelta(seconds=round(seconds))} h"


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
    screen.table("Trials, the best so far first", _result_rows(now))


def _result_rows(content: Json) -> Iterator[tuple[str, str]]:
    """Trials by their last held-out loss, or their smallest while they are trained, relative to the base's."""

    def place(trial: Json) -> float:
        probe = trial["final"] or trial["best"]
        return probe["relative"] if probe else float("inf")

    for trial in sorted(content["trials"], key=place):
        words = [f"{trial['status']} at {trial['step']}/{trial['num_updates']}"]
        probes = [(name, trial[name]) for name in ("final", "best") if trial[name] is not None]
        words += [f"{name} {probe['relative']:.4f} (step {probe['step']})" for name, probe in probes]
        if trial["reason"]:
            words.append(trial["reason"])
        yield trial["name"], ", ".join(words)


def _curves(groups: Sequence[TrialGroup]) -> list[Curve]:
    """The LR of each arm of the first seed; other seeds have the same."""
    curves: dict[str, Curve] = {}
    for group in groups:
        for member in group.members:
            plan = member.prepared.plan
            first = lay_groups(member.prepared.config, plan.lr_horizon)[0]
            lrs = [first.lr(k) for k in range(plan.num_updates)]
            curves.setdefault(member.trial.arm, Curve(member.trial.arm, lrs))
    return list(curves.values())


def _show_curves(prepared: PreparedSweep, screen: Screen) -> None:
    curves = _curves(prepared.groups)
    if curves:
        width = min(100, shutil.get_terminal_size().columns)
        screen.say("\n" + terminal_plot(curves, title=prepared.config.name, width=width))
