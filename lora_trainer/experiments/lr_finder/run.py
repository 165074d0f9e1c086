"""The LR finder trains two groups: a ramp that is validated at every step, and short runs that verify its answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from accelerate import PartialState

from lora_trainer.config.places import METRICS_FILE
from lora_trainer.errors import Problem, StoppedBySignal
from lora_trainer.experiments.lr_finder.analysis import (
    FinderResult,
    Point,
    analyse,
    has_diverged,
    judge,
    lrs_around,
    paired_gain,
)
from lora_trainer.experiments.lr_finder.prepare import HIGHEST_LR, PreparedFinder
from lora_trainer.runtime.launch import read_launch
from lora_trainer.runtime.runtime import joined_processes
from lora_trainer.tracking.console import MainConsole
from lora_trainer.tracking.metrics import step_rows
from lora_trainer.training.fit import fit
from lora_trainer.training.group import TrialGroup
from lora_trainer.training.trial import Ending
from lora_trainer.training.validation import Measurement


def find_lr(
    finder: PreparedFinder, *, console: MainConsole, should_stop: Callable[[], bool] = lambda: False
) -> FinderResult:
    """Measure the ramp, read it, and verify the reading where that was asked for.

    Args:
        should_stop: asked before every update; when it says so, the finder ends without a result.

    Raises:
        StoppedBySignal: `should_stop` said so.
        TrainerError: the data, base or host is at fault.
    """
    started, verification = time.perf_counter(), None
    ramp = RampObserver(finder, console)
    try:
        with joined_processes(read_launch(finder.prepared.config)) as joined:
            fit(finder.ramp_group(), console=console, should_stop=should_stop, on_measure=ramp.observe, joined=joined)
            points = ramp.with_log()
            reading = analyse(points, finder.fallback_lr)
            if finder.options.verify and reading.verdict == "found":
                group = finder.verification_group(lrs_around(reading.suggestion, HIGHEST_LR))
                runs = run_short(group, console=console, should_stop=should_stop, joined=joined)
                verification = judge(runs, ramp.start_NS)
    except StoppedBySignal as error:
        raise StoppedBySignal(Problem("stopped as asked; there is no answer yet", fix="start it again")) from error
    return FinderResult(reading, points, ramp.start_NS, verification, time.perf_counter() - started)


def run_short(
    group: TrialGroup, *, console: MainConsole, should_stop: Callable[[], bool], joined: PartialState
) -> dict[float, np.ndarray | None]:
    """Train a verification group, all its learning rates in one forward, and measure each at its end."""
    relative: dict[str, np.ndarray] = {}

    def observe(step: int, measurements: Sequence[Measurement]) -> None:
        if step == group.num_steps:
            relative.update({measurement.trial.name: _relative(measurement) for measurement in measurements})

    fit(group, console=console, should_stop=should_stop, on_measure=observe, joined=joined)
    lrs = {member.name: member.prepared.param_groups()[0].lr(0) for member in group.members}
    return {lr: relative.get(name) for name, lr in lrs.items()}


@dataclass
class RampObserver:
    """Collects a point per update, and ends the ramp where the probe has diverged."""

    finder: PreparedFinder
    console: MainConsole
    points: dict[int, Point] = field(default_factory=dict)
    """By step."""
    start_NS: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    num_skipped: int = 0

    def observe(self, step: int, measurements: Sequence[Measurement]) -> None:
        if step == 0:
            self.start_NS = _relative(measurements[0])
        elif not measurements:  # the trial failed: its numbers were not finite
            self._add(step, None)
        elif measurements[0].trial.skips.total > self.num_skipped:  # an fp16 overflow: no point
            self.num_skipped = measurements[0].trial.skips.total
        else:
            self._add(step, _relative(measurements[0]))
            if has_diverged([*self.points.values()]):
                measurements[0].trial.ending = Ending(step, "stopped", "the held-out loss has diverged")

    def _add(self, step: int, relative_NS: np.ndarray | None) -> None:
        gain, se = (np.nan, np.nan) if relative_NS is None else paired_gain(relative_NS, self.start_NS)
        kept_NS = relative_NS if np.isfinite(gain) else None
        self.points[step] = point = Point(self.finder.lr(step - 1), gain, se, relative_NS=kept_NS)
        if step % max(1, self.finder.options.num_steps // 10) == 0:
            self.console.print(f"  lr {point.lr:.2e}  gain {point.gain:+.4%} +- {point.se:.4%}")

    def with_log(self) -> tuple[Point, ...]:
        """What was measured, with what the log says of the updates."""
        rows = {row["step"]: row for row in step_rows(self.finder.folder / METRICS_FILE)}
        told = {"lr": "lr", "training_loss": "loss", "grad_norm": "grad_norm"}
        return tuple(
            replace(point, **{name: rows[step][key] for name, key in told.items() if step in rows})
            for step, point in self.points.items()
        )


def _relative(measurement: Measurement) -> np.ndarray:
    """Losses [N, S] relative to the base's mean of each stratum."""
    held_out = measurement.held_out
    return held_out.losses_NS / held_out.base_NS.mean(axis=0)
