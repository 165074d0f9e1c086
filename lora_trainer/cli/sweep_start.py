"""One start of a sweep: plan, train every group, keep `sweep.json` up to date, report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from lora_trainer.cli.session import StopRequest, record_exit, set_aside
from lora_trainer.cli.sweep_status import result_rows
from lora_trainer.config.load import to_yaml
from lora_trainer.config.places import run_directory
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.trials import TrialConfig
from lora_trainer.errors import ExitCode, TrainerError
from lora_trainer.experiments.sweep.fewer_seeds import trials_to_drop
from lora_trainer.experiments.sweep.groups import trials_of, without
from lora_trainer.experiments.sweep.placement import Local
from lora_trainer.experiments.sweep.prepare import PreparedSweep, prepare_sweep, sweep_rows
from lora_trainer.experiments.sweep.record import Json, describe_sweep, refreshed, without_dropped, write_sweep
from lora_trainer.report.page import write_report
from lora_trainer.report.pictures import Curve, draw_schedules, terminal_plot
from lora_trainer.runtime.launch import Launch
from lora_trainer.storage import atomic_files, disk_space
from lora_trainer.tracking.console import Screen
from lora_trainer.training.group import TrialGroup

if TYPE_CHECKING:
    from accelerate import PartialState

CURVES, REPORT = "lr-curves.png", "report.html"


@dataclass(frozen=True, slots=True)
class SweepStart:
    """How a sweep was started."""

    launch: Launch
    screen: Screen
    stop: StopRequest
    dry_run: bool
    fresh: bool
    measure: bool
    joined: PartialState | None = None
    """The processes, where they have found each other already: a second time is unreliable."""

    def run(self, config: RunConfig, trials: Sequence[TrialConfig], screened: Mapping[str, str] | None = None) -> None:
        """Plan a sweep and train it to its end.

        Args:
            screened: arms that short runs left out, with the reason.
        """
        sweep_dir, writes = run_directory(config), self.launch.is_main and not self.dry_run
        with ExitStack() as stack:
            if writes:
                stack.enter_context(atomic_files.sole_writer(sweep_dir, self.screen.say))
                if self.fresh:
                    set_aside(sweep_dir, self.screen)
            try:
                with disk_space.faults_in_words():
                    whole = prepare_sweep(config, trials, self.launch, self.screen.track)
                    left_out = {k: v for group in whole.groups for k, v in trials_of(group, screened or {}).items()}
                    prepared = whole.left_with(left_out)
                    self.screen.table(f"Plan of {config.name}", [*sweep_rows(prepared), *left_out.items()])
                    if self.dry_run:
                        self._show(prepared)
                    else:
                        record = describe_sweep(config.name, whole.groups, whole.before)
                        self._train(prepared, without_dropped(record, left_out))
            except TrainerError as error:
                if writes:
                    record_exit(sweep_dir, error.exit_code, error.title, str(error.problems[0].what))
                raise

    def agree(self, screened: dict[str, str]) -> dict[str, str]:
        """What the main process read, where several have joined: the others may have read before it wrote."""
        if self.joined is None:
            return screened
        from lora_trainer.runtime.runtime import from_main

        return dict(from_main(self.launch, screened))

    def _show(self, prepared: PreparedSweep) -> None:
        """What a plan shows beyond its rows."""
        curves = _curves(prepared.groups)
        if curves:
            width = min(100, shutil.get_terminal_size().columns)
            self.screen.say("\n" + terminal_plot(curves, title=prepared.config.name, width=width))
        if self.measure:
            self.screen.table("Measured on this machine", list(self._measured_rows(prepared)))

    def _measured_rows(self, prepared: PreparedSweep) -> Iterator[tuple[str, str]]:
        """Time and memory of each group, by a few updates of it."""
        from lora_trainer.training.fit import estimate

        with nullcontext(self.joined) if self.joined else join(self.launch) as joined:
            measured = [(group, estimate(group, screen=self.screen, joined=joined)) for group in prepared.groups]
        seconds = 0.0
        for group, found in measured:
            seconds += found.seconds
            each = f"activations of {disk_space.mib(found.activation_bytes)} per trial"
            peak = f"peak memory {found.peak_memory_gib:.1f} GiB"
            yield group.name, f"{found.trials_per_pass} trials per pass, {each}, {peak}, {_duration(found.seconds)}"
        yield "in all", f"{_duration(seconds)}, without exports and samples"

    def _train(self, prepared: PreparedSweep, record: Json) -> None:
        from lora_trainer.runtime.runtime import from_main
        from lora_trainer.training.fit import fit

        sweep_dir, finished = prepared.sweep_dir, list[str]()

        def save() -> None:
            if self.launch.is_main:
                write_sweep(sweep_dir, refreshed(record, sweep_dir, finished))

        def train(planned: TrialGroup) -> None:
            nonlocal record
            dropped = from_main(self.launch, trials_to_drop(planned, refreshed(record, sweep_dir, finished)))
            record = without_dropped(record, dropped)
            place = f"{len(finished) + 1} of {len(prepared.groups)}"
            self.screen.say(f"\ngroup {planned.name} ({place}): {len(planned.members) - len(dropped)} trials")
            for name, reason in dropped.items():
                self.screen.say(f"{name} is not trained: {reason}")
            save()
            if (group := without(planned, dropped)) is not None:
                fit(group, screen=self.screen, should_stop=self.stop, on_save=save, joined=joined)

        if self.launch.is_main:
            atomic_files.write_file(sweep_dir / "config.yaml", to_yaml(prepared.config).encode())
            if prepared.groups:
                draw_schedules(_curves(prepared.groups), sweep_dir / CURVES, title=prepared.config.name)
        save()
        with nullcontext(self.joined) if self.joined else join(self.launch) as joined:
            for group in Local().run(prepared.groups, train):
                finished.append(group.name)
                save()
        if self.launch.is_main:
            sentence = write_report([sweep_dir], sweep_dir / REPORT)
            record_exit(sweep_dir, ExitCode.DONE, "finished", f"{len(record['trials'])} trials")
            self.screen.table("Done", result_rows(refreshed(record, sweep_dir, finished)))
            self.screen.say(f"\n{sentence}\nresults: {sweep_dir / 'sweep.json'}\nreport: {sweep_dir / REPORT}")


def join(launch: Launch) -> AbstractContextManager[PartialState]:
    """Find the other processes (`lora_trainer.runtime.runtime.joined_processes`)."""
    from lora_trainer.runtime.runtime import joined_processes

    return joined_processes(launch)


def _duration(seconds: float) -> str:
    return f"about {timedelta(seconds=round(seconds))} h"


def _curves(groups: Sequence[TrialGroup]) -> list[Curve]:
    """The LR of each arm of the first seed; other seeds have the same."""
    curves: dict[str, Curve] = {}
    for group in groups:
        for member in group.members:
            first = member.prepared.lr_groups()[0]
            lrs = [first.lr(k) for k in range(member.prepared.plan.num_updates)]
            curves.setdefault(member.trial.arm, Curve(member.trial.arm, lrs))
    return list(curves.values())
