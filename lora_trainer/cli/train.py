"""`lora-trainer train` and `sweep`: plan, train, report, say where everything is.

A sweep may begin with short runs that choose learning rates. `--confirm` after a finished sweep trains its leaders
again, on fresh seeds, and writes one report over both; `--status` says where it stands.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lora_trainer.cli.session import StopRequest, check_platform, record_exit, writing
from lora_trainer.config import places
from lora_trainer.config.load import load_config, to_yaml
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.trials import TrialConfig, load_sweep
from lora_trainer.errors import ConfigError, ExitCode, NumericStop, Problem
from lora_trainer.experiments.sweep import record
from lora_trainer.experiments.sweep.derived import confirmation_directory, plan_confirmation, plan_short_runs
from lora_trainer.experiments.sweep.prepare import (
    PreparedSweep,
    prepare_sweep,
    sweep_rows,
    trials_of,
    trials_to_drop,
    without,
)
from lora_trainer.experiments.sweep.record import Json, unfinished_trials
from lora_trainer.planning.memory import planned_peak_gib
from lora_trainer.planning.preflight import check_places
from lora_trainer.planning.prepare import Prepared, check_resume, prepare
from lora_trainer.planning.rows import files_to_come, plan_rows
from lora_trainer.report.runs import SWEEP_FILE
from lora_trainer.runtime.launch import Launch, read_launch
from lora_trainer.storage import atomic_files, disk_space
from lora_trainer.tracking.console import LOADING, MainConsole, needless
from lora_trainer.training.group import TrialGroup, solo_group

if TYPE_CHECKING:
    from accelerate import PartialState

    from lora_trainer.report.pictures import Curve

LR_CURVES = "lr-curves.png"


def train(
    config_file: Path, overrides: Sequence[str], *, dry_run: bool = False, fresh: bool = False, measure: bool = False
) -> None:
    """Run one training, or the sweep that the config describes, to its end, or print its plan.

    Args:
        measure: add to a printed plan what a few updates took.

    Raises:
        TrainerError: whatever went wrong, with its exit code; also recorded in the run directory's exit.json.
    """
    check_platform()
    config = load_config(config_file, overrides)
    if config.sweep is not None:
        sweep(config_file, overrides, dry_run=dry_run, fresh=fresh, measure=measure)
        return
    with starting(config, dry_run=dry_run, fresh=fresh, measure=measure) as start, start.writing(config):
        prepared = prepare(config, start.launch, start.console.track)
        if dry_run and not fresh:
            check_resume(prepared)
        start.console.table(f"Plan of {config.name}", plan_rows(prepared))
        start.show_measured([solo_group(prepared)])
        if not dry_run:
            start.train_run(prepared)


def sweep(
    config_file: Path, overrides: Sequence[str], *, dry_run: bool = False, fresh: bool = False, measure: bool = False
) -> None:
    """Run a sweep to its end, or print its plan.

    Args:
        measure: add to a printed plan what a few updates of each group took.

    Raises:
        TrainerError: whatever went wrong, with its exit code; also recorded in the sweep directory's exit.json.
    """
    check_platform()
    config, trials = _load(config_file, overrides)
    with starting(config, dry_run=dry_run, fresh=fresh, measure=measure) as start:
        short = plan_short_runs(config, trials)
        screened: dict[str, str] = {}
        if short is not None:
            aim = f"choose {short.keep} of the LRs of each setting"
            start.console.print(f"first: short runs of {short.num_steps} updates {aim}")
            start.train_sweep(*load_sweep(config_file, [*overrides, *short.overrides]))
            done = record.read_sweep(short.folder)
            screened = start.agree(short.dropped_arms(done) if done and not unfinished_trials(done) else {})
        start.train_sweep(config, trials, screened)


def confirm(
    config_file: Path, overrides: Sequence[str], *, dry_run: bool = False, fresh: bool = False, measure: bool = False
) -> None:
    """Choose the leaders, run the sweep that confirms them, and write the report of the sweep anew with its answer.

    Raises:
        TrainerError: the sweep is not finished, or whatever `sweep` raises.
    """
    config, _ = _load(config_file, overrides)
    launch = read_launch(config)
    console = MainConsole(silent=not launch.is_main)
    chosen = plan_confirmation(config, anew=fresh)
    rows = [(arm, f"held-out loss {loss:.4f} of the base's, mean of its seeds") for arm, loss in chosen.losses.items()]
    rows.append(("fresh seeds", ", ".join(map(str, chosen.seeds))))
    console.table("Leaders, as an earlier start chose them" if chosen.began else "Leaders", rows)
    failure: NumericStop | None = None
    try:
        sweep(config_file, [*overrides, *chosen.overrides], dry_run=dry_run, fresh=fresh, measure=measure)
    except NumericStop as error:  # an answer too
        failure = error
    if launch.is_main and not dry_run:
        page = places.report_file(config)
        _report(page, console, confirm=[confirmation_directory(config)])
    if failure is not None:
        raise failure


def _load(config_file: Path, overrides: Sequence[str]) -> tuple[RunConfig, list[TrialConfig]]:
    """The configuration of a sweep and those of its trials.

    Raises:
        ConfigError: it has no `sweep` section, or as `load_sweep`.
    """
    if load_config(config_file, overrides).sweep is None:
        what = "there is no `sweep` section, so there are no trials to compare"
        fix = "add one, as in sweep: {grid: {optimizer.lr: [1e-4, 3e-4]}} (docs/sweeps.md), or use train"
        raise ConfigError(Problem(what, str(config_file), fix=fix))
    return load_sweep(config_file, overrides)


@dataclass(frozen=True)
class Start:
    """How a run or a sweep was started."""

    launch: Launch
    console: MainConsole
    stop: StopRequest
    stack: ExitStack
    """Closed at the end of this start."""
    dry_run: bool
    fresh: bool
    measure: bool

    @cached_property
    def joined(self) -> PartialState:
        """The processes, which find each other on first use: a second time is unreliable."""
        self.console.print(LOADING)
        from lora_trainer.runtime.runtime import joined_processes

        return self.stack.enter_context(joined_processes(self.launch))

    def writing(self, config: RunConfig) -> AbstractContextManager[None]:
        """Be the only writer of a directory, where this process writes at all."""
        if self.dry_run or not self.launch.is_main:
            return nullcontext()
        check_places(config)
        return writing(places.run_directory(config), self.console, fresh=self.fresh)

    def train_run(self, prepared: Prepared) -> None:
        """Train a run to its end, and report."""
        self.console.print(LOADING)
        from lora_trainer.training.fit import fit

        name, run_dir = prepared.config.name, prepared.run_dir
        result = fit(solo_group(prepared), console=self.console, should_stop=self.stop)
        if (ending := result.endings[name]) is not None:
            what = f"training stopped after step {ending.step}, which is saved: {ending.reason}"
            fix = (
                "lower optimizer.lr (a tenth), use bf16 or fp32, look at the images named; the run goes on "
                "with the change and 'resume.allow_changes=[optimizer.lr]' (the key that you changed)"
            )
            raise NumericStop(Problem(what, str(run_dir), fix=fix))
        if result.was_finished:
            self.console.print("this run is finished; nothing to do")
        if self.launch.is_main:
            record_exit(run_dir, ExitCode.DONE, "finished", f"{result.step} updates")  # the report tells of it
            if not (result.was_finished and places.report_file(prepared.config).is_file()):
                self.console.print("drawing the curves and the report")
                with needless(places.CURVES_FILE, self.console.print):
                    from lora_trainer.report.pictures import draw_curves

                    draw_curves(run_dir / places.METRICS_FILE, run_dir / places.CURVES_FILE, name)
                _report(places.report_file(prepared.config), self.console, says=False)
        self.console.table("Done", done_rows(prepared.config))

    def agree(self, screened: dict[str, str]) -> dict[str, str]:
        """What the main process read, where several train: the others may have read before it wrote."""
        if self.launch.num_processes == 1 or (self.dry_run and not self.measure):
            return screened
        from lora_trainer.runtime.runtime import from_main

        return dict(from_main(self.launch, screened))

    def train_sweep(
        self, config: RunConfig, trials: Sequence[TrialConfig], screened: Mapping[str, str] | None = None
    ) -> None:
        """Plan a sweep and train it to its end.

        Args:
            screened: arms that short runs left out, with the reason.
        """
        with self.writing(config):
            whole = prepare_sweep(config, trials, self.launch, self.console.track)
            left_out = {k: v for group in whole.groups for k, v in trials_of(group, screened or {}).items()}
            prepared = whole.left_with(left_out)
            self.console.table(f"Plan of {config.name}", [*sweep_rows(prepared), *left_out.items()])
            if self.dry_run:
                self._show(prepared)
            else:
                described = record.describe_sweep(config.name, whole.groups, whole.before)
                self._train_groups(prepared, record.without_dropped(described, left_out))

    def _show(self, prepared: PreparedSweep) -> None:
        """What a plan shows beyond its rows."""
        if curves := _curves(prepared.groups):
            from lora_trainer.report.pictures import terminal_plot

            width = min(100, shutil.get_terminal_size().columns)
            self.console.drawing("\n" + terminal_plot(curves, title=prepared.config.name, width=width))
        self.show_measured(prepared.groups)

    def show_measured(self, groups: Sequence[TrialGroup]) -> None:
        """What a few updates took, where that was asked for."""
        if self.measure and self.dry_run:
            self.console.table("Measured on this machine", list(self._measured_rows(groups)))

    def _measured_rows(self, groups: Sequence[TrialGroup]) -> Iterator[tuple[str, str]]:
        """Time and memory of each group, by a few updates of it."""
        from lora_trainer.training.fit import estimate

        joined, seconds = self.joined, 0.0
        for group in groups:
            cost = estimate(group, console=self.console, joined=joined)
            seconds += cost.seconds
            packed = f"{cost.trials_per_pass} trials per pass, " if len(group.members) > 1 else ""
            activations = f"activations of {disk_space.mib(cost.activation_bytes)} per trial"
            planned = planned_peak_gib(group.shared, len(group.members), cost.trials_per_pass)
            peak = f"peak memory {cost.peak_memory_gib:.1f} GiB (estimated: {planned:.1f})"
            took = f"{cost.seconds_per_step:.2f} s per update, {_duration(cost.seconds)}"
            yield group.name, f"{packed}{activations}, {peak}, {took}"
        yield "in all", f"{_duration(seconds)}, without exports and samples"

    def _train_groups(self, prepared: PreparedSweep, content: Json) -> None:
        """Train group after group, keep `sweep.json` up to date, and report.

        Args:
            content: of `sweep.json`, as planned.
        """
        from lora_trainer.runtime.runtime import from_main
        from lora_trainer.training.fit import fit

        sweep_dir, finished = places.run_directory(prepared.config), list[str]()

        def save() -> None:
            if self.launch.is_main:
                atomic_files.write_json(sweep_dir / SWEEP_FILE, record.refreshed(content, sweep_dir, finished))

        if self.launch.is_main:
            atomic_files.write_file(sweep_dir / places.CONFIG_FILE, to_yaml(prepared.config).encode())
            with needless(LR_CURVES, self.console.print):
                from lora_trainer.report.pictures import draw_schedules

                if prepared.groups:
                    draw_schedules(_curves(prepared.groups), sweep_dir / LR_CURVES, title=prepared.config.name)
        save()
        joined = self.joined
        for number, planned in enumerate(prepared.groups, start=1):
            now = record.refreshed(content, sweep_dir, finished)
            dropped = from_main(self.launch, trials_to_drop(planned, now))
            content = record.without_dropped(content, dropped)
            place = f"{number} of {len(prepared.groups)}"
            self.console.print(f"\ngroup {planned.name} ({place}): {len(planned.members) - len(dropped)} trials")
            for name, reason in dropped.items():
                self.console.print(f"{name} is not trained: {reason}")
            save()
            if (group := without(planned, dropped)) is not None:
                fit(group, console=self.console, should_stop=self.stop, on_save=save, joined=joined)
            finished.append(planned.name)
            save()
        now = from_main(self.launch, record.refreshed(content, sweep_dir, finished))
        if self.launch.is_main:
            self.console.table("Done", record.result_rows(now))
            self.console.print(f"\nresults: {sweep_dir / SWEEP_FILE}; drawing the report")
            _report(sweep_dir / places.REPORT_FILE, self.console)
        statuses = {trial["status"] for trial in now["trials"]}
        if "failed" in statuses and "finished" not in statuses:
            fix = "lower optimizer.lr in the arms (a tenth), use bf16 or fp32, and give the sweep another name"
            raise NumericStop(Problem("no trial came to its end", str(sweep_dir), "their numbers were not finite", fix))
        if self.launch.is_main:
            record_exit(sweep_dir, ExitCode.DONE, "finished", f"{len(content['trials'])} trials")


@contextmanager
def starting(config: RunConfig, *, dry_run: bool, fresh: bool, measure: bool = False) -> Iterator[Start]:
    """Listen to signals inside the block, and say in words where the disk is full."""
    launch = read_launch(config)
    with ExitStack() as stack:
        stack.enter_context(disk_space.faults_in_words())
        stop = stack.enter_context(StopRequest().listening())
        yield Start(launch, MainConsole(silent=not launch.is_main), stop, stack, dry_run, fresh, measure)


def done_rows(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What a finished run left, and what to do with it."""
    yield "LoRA", str(places.lora_file(config))
    yield "", "copy it to ComfyUI/models/loras, or for A1111 and Forge to models/Lora"
    yield "for diffusers", str(places.diffusers_lora_file(config))
    yield from ((file.name, str(file)) for file in files_to_come(config) if file.suffix != ".safetensors")


def measure_groups(groups: Sequence[TrialGroup]) -> None:
    """Print what a few updates of each group take."""
    if groups:
        with starting(groups[0].shared.config, dry_run=True, fresh=False, measure=True) as start:
            start.show_measured(groups)


def _duration(seconds: float) -> str:
    return f"about {timedelta(seconds=round(seconds))} h"


def _report(page: Path, console: MainConsole, *, confirm: Sequence[Path] = (), says: bool = True) -> None:
    """Write the page of the folder that it lies in, and say what stands at its head."""
    with needless(page.name, console.print):
        from lora_trainer.report.page import write_report

        sentence = write_report([page.parent], page, confirm=confirm)
        if says:
            console.print(f"\n{sentence}\nreport: {page}")


def _curves(groups: Sequence[TrialGroup]) -> list[Curve]:
    """The LR of each arm of the first seed; other seeds have the same."""
    from lora_trainer.report.pictures import Curve

    curves: dict[str, Curve] = {}
    for member in (member for group in groups for member in group.members):
        if (arm := member.trial.arm) not in curves:
            first = member.prepared.param_groups()[0]
            curves[arm] = Curve(arm, [first.lr(k) for k in range(member.prepared.plan.num_steps)])
    return list(curves.values())


def show_status(config_file: Path, overrides: Sequence[str], *, confirmation: bool = False) -> None:
    """Say where a sweep stands, or its confirmation, from its files alone.

    Raises:
        ConfigError: it was never started.
    """
    config = load_config(config_file, overrides)
    sweep_dir = confirmation_directory(config) if confirmation else places.run_directory(config)
    content = record.read_sweep(sweep_dir)
    if content is None:
        raise ConfigError(Problem("no sweep has been started here", str(sweep_dir), fix="start it without --status"))
    now = record.refreshed(content, sweep_dir)
    num_ended = len(now["trials"]) - len(unfinished_trials(now))
    groups = [
        (g["name"], f"{g['status']}, update {g['step']} of {g['num_updates']}, {len(g['trials'])} trials")
        for g in now["groups"]
    ]
    console = MainConsole()
    console.table(f"{now['name']}: {num_ended} of {len(now['trials'])} trials ended", groups)
    console.table("Trials, the best so far first", record.result_rows(now))
