"""The LR finder trains two groups: a ramp that is validated at every step, and short runs that verify its answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from accelerate import PartialState

from lora_trainer.config.places import METRICS_FILE
from lora_trainer.errors import Problem, StoppedBySignal
from lora_trainer.experiments.lr_finder.analysis import Point, RampReading, analyse, has_diverged, paired_gain
from lora_trainer.experiments.lr_finder.prepare import HIGHEST_LR, PreparedFinder
from lora_trainer.experiments.lr_finder.verification import ShortRun, Verification, judge, lrs_around
from lora_trainer.planning.prepare import Prepared
from lora_trainer.runtime.launch import read_launch
from lora_trainer.runtime.runtime import joined_processes
from lora_trainer.tracking.console import Screen
from lora_trainer.tracking.metrics import step_rows
from lora_trainer.training.fit import fit
from lora_trainer.training.group import TrialGroup
from lora_trainer.training.trial import Ending
from lora_trainer.training.validation import Measurement


@dataclass(frozen=True, slots=True)
class Measured:
    """One update of the ramp as it was measured."""

    point: Point
    relative_NS: np.ndarray | None
    """Relative losses of the probe's N images at S strata; None where the update's numbers were not finite."""
    grad_norm: float | None


@dataclass(frozen=True, slots=True)
class Found:
    """All that the finder saw and says."""

    reading: RampReading
    measured: tuple[Measured, ...]
    start_NS: np.ndarray
    verification: Verification | None
    seconds: float

    @property
    def lr(self) -> float:
        """The learning rate to use: the verified one where there is one."""
        verified = None if self.verification is None else self.verification.choice
        return self.reading.suggestion if verified is None else verified


def find_lr(finder: PreparedFinder, *, screen: Screen, should_stop: Callable[[], bool] = lambda: False) -> Found:
    """Measure the ramp, read it, and verify the reading where that was asked for.

    Args:
        should_stop: asked before every update; when it says so, the finder ends without a result.

    Raises:
        StoppedBySignal: `should_stop` said so.
        TrainerError: the data, base or host is at fault.
    """
    started = time.perf_counter()
    try:
        return _find(finder, screen, should_stop, started)
    except StoppedBySignal as error:
        raise StoppedBySignal(Problem("stopped as asked; there is no answer yet", fix="start it again")) from error


def _find(finder: PreparedFinder, screen: Screen, should_stop: Callable[[], bool], started: float) -> Found:
    with joined_processes(read_launch(finder.prepared.config)) as joined:
        ramp = RampObserver(finder, screen)
        fit(finder.ramp_group(), screen=screen, should_stop=should_stop, on_measure=ramp.observe, joined=joined)
        measured = ramp.measured()
        reading = analyse([each.point for each in measured], finder.fallback_lr)
        verification = None
        if finder.options.verify and reading.verdict == "found":
            group = finder.verification_group(lrs_around(reading.suggestion, HIGHEST_LR))
            runs = run_short(group, screen=screen, should_stop=should_stop, joined=joined)
            verification = judge(runs, ramp.start_NS)
    return Found(reading, measured, ramp.start_NS, verification, time.perf_counter() - started)


def run_short(
    group: TrialGroup, *, screen: Screen, should_stop: Callable[[], bool], joined: PartialState
) -> list[ShortRun]:
    """Train a verification group, all its learning rates in one forward, and measure each at its end."""
    relative: dict[str, np.ndarray] = {}

    def observe(step: int, measurements: Sequence[Measurement]) -> None:
        if step == group.num_updates:
            relative.update({own.trial.name: _relative(own) for own in measurements})

    fit(group, screen=screen, should_stop=should_stop, on_measure=observe, joined=joined)
    return [ShortRun(_first_lr(member.prepared), relative.get(member.name)) for member in group.members]


@dataclass
class RampObserver:
    """Collects a point per update, and ends the ramp where the probe has diverged."""

    finder: PreparedFinder
    screen: Screen
    steps: list[int] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    relative: list[np.ndarray | None] = field(default_factory=list)
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
            if has_diverged(self.points):
                measurements[0].trial.ending = Ending(step, "stopped", "the held-out loss has diverged")

    def _add(self, step: int, relative_NS: np.ndarray | None) -> None:
        gain, se = (np.nan, np.nan) if relative_NS is None else paired_gain(relative_NS, self.start_NS)
        point = Point(self.finder.lr(step - 1), gain, se, np.nan)
        self.steps.append(step)
        self.points.append(point)
        self.relative.append(relative_NS if point.is_finite else None)
        if step % max(1, self.finder.options.num_updates // 10) == 0:
            self.screen.say(f"  lr {point.lr:.2e}  gain {point.gain:+.4%} +- {point.se:.4%}")

    def measured(self) -> tuple[Measured, ...]:
        """The points with what the log says of their updates."""
        rows = {row["step"]: row for row in step_rows(self.finder.folder / METRICS_FILE)}
        found = []
        for step, point, relative_NS in zip(self.steps, self.points, self.relative, strict=True):
            row = rows.get(step, {})
            seen = replace(point, lr=row.get("lr", point.lr), training_loss=row.get("loss", np.nan))
            found.append(Measured(seen, relative_NS, row.get("grad_norm")))
        return tuple(found)


def _relative(measurement: Measurement) -> np.ndarray:
    """Losses [N, S] relative to the base's mean of each stratum."""
    held_out = measurement.held_out
    return held_out.losses_NS / held_out.base_NS.mean(axis=0)


def _first_lr(prepared: Prepared) -> float:
    return prepared.lr_groups()[0].lr(0)
