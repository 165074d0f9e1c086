"""When the probes are measured, and what follows: plateau schedules react, the best is remembered, rules end trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_trainer.evidence.statistics.paired import rise_in_se
from lora_trainer.tracking.metrics import HELD_OUT
from lora_trainer.training.trial import Ending, Trial
from lora_trainer.training.validation import ProbeReading, Validator


@dataclass(frozen=True, slots=True)
class Measurement:
    """One trial's probes after some update, and what they changed."""

    trial: Trial
    readings: dict[str, ProbeReading]
    reduced: tuple[str, ...] = ()
    """LR groups whose plateau schedule falls from the next update on."""
    is_best: bool = False

    @property
    def held_out(self) -> ProbeReading:
        return self.readings[HELD_OUT]


@dataclass(frozen=True, slots=True)
class ValidationSchedule:
    """Every process measures its share and comes to the same conclusions."""

    validator: Validator
    passes: Sequence[Sequence[Trial]]
    every: int
    num_updates: int
    diverged: float | None = None
    """Held-out loss over the base's from which a trial ends (`sweep.prune.diverged`)."""

    def is_due(self, step: int) -> bool:
        """Whether the probes are measured after this many updates."""
        return step % self.every == 0 or step == self.num_updates

    def start(self) -> list[Measurement]:
        """The probes before the first update: the base itself, as an adapter's B is zero."""
        base = {name: ProbeReading(losses, losses) for name, losses in self.validator.base().items()}
        return [Measurement(trial, base) for members in self.passes for trial in members]

    def measure(self, step: int) -> list[Measurement]:
        """Measure every live trial's exported weights, feed its schedules and compare with its best."""
        readings = self._readings()
        trials = [trial for members in self.passes for trial in members if trial.is_live]
        measured = [_conclude(trial, step, readings[trial.computed_by.name]) for trial in trials]
        if step < self.num_updates and self.diverged is not None:
            for each in measured:
                if not (loss := each.held_out.relative) < self.diverged:  # NaN too
                    reason = f"held-out loss {loss:.4g} times the base's, {self.diverged:g} allowed"
                    each.trial.end(Ending(step, "stopped", f"sweep.prune.diverged: {reason}"))
        return measured

    def _readings(self) -> dict[str, dict[str, ProbeReading]]:
        """By trial; those that share a parent's updates are measured with it."""
        found: dict[str, dict[str, ProbeReading]] = {}
        for own in self.passes:
            members = [trial for trial in own if trial.parent is None]
            if any(trial.is_live for trial in members):
                measured = self.validator.measure({trial.adapter: trial.weights() for trial in members})
                found |= {trial.name: readings for trial, readings in zip(members, measured, strict=True)}
        return found


def _conclude(trial: Trial, step: int, readings: dict[str, ProbeReading]) -> Measurement:
    held_out = readings[HELD_OUT]
    reduced = tuple(
        group.name
        for group in trial.groups
        if group.schedule.feedback is not None and group.schedule.feedback.observe(step, held_out.items, rise_in_se)
    )
    is_best = math.isfinite(held_out.relative) and (trial.best is None or held_out.relative < trial.best.relative)
    if is_best:
        trial.remember_best(step, held_out.relative)
    return Measurement(trial, readings, reduced, is_best)
