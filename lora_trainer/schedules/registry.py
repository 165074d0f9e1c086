"""Every learning-rate schedule, one row each: the union of the config, the known names and the docs follow from it.

Outside schedules join by the entry point group `lora_trainer.lr_schedules` (docs/extending.md).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from lora_trainer.schedules import curves, cycles
from lora_trainer.schedules.external import PluginSchedule, TorchSchedule, plugin_names
from lora_trainer.schedules.schedule import (
    Core,
    Duration,
    Horizon,
    LRSchedule,
    Mark,
    ScheduleError,
    ScheduleOptions,
    at_least_one,
)
from lora_trainer.strict_model import Positive, StrictModel, gathering


class Phase(StrictModel):
    """One part of a composed schedule."""

    steps: Duration
    """Its length: updates, epochs ("2ep") or a share of the run. Required."""
    scale: Positive = 1.0
    """Factor on the whole phase."""
    schedule: LRSchedulerOptions
    """The schedule that runs from 0 over this phase; written beside `steps`, as in {type: linear, steps: 100}."""


class Phases(ScheduleOptions):
    """m = scale x the multiplier of the phase that update k lies in, each phase counting from 0 over its own length."""

    type: Literal["phases"] = "phases"
    phases: Annotated[tuple[Annotated[Phase, gathering("schedule", "steps", "scale")], ...], Field(min_length=1)]
    """List of {type, steps, scale, options of that type}; the steps should sum to the run. Required."""
    example: ClassVar[dict[str, Any]] = {
        "phases": [
            {"type": "constant_with_warmup", "steps": "20%", "warmup_steps": "50%"},
            {"type": "constant", "steps": "40%"},
            {"type": "cosine", "steps": "40%", "scale": 0.5},
        ]
    }
    summary: ClassVar[str] = "any schedules, joined end to end"
    limits: ClassVar[str] = "lengths are yours to add up"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        parts = self._parts(horizon)

        def joined(k: int, base_lr: float) -> float:
            start, scale, schedule = next(part for part in reversed(parts) if k >= part[0])
            return scale * schedule.multiplier(k - start, base_lr)

        return joined

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        parts = self._parts(horizon)
        inner = [Mark(start + mark.update, mark.label) for start, _, schedule in parts for mark in schedule.marks]
        borders = [Mark(start, f"Phase {number}") for number, (start, _, _) in enumerate(parts, start=1) if start]
        return tuple(sorted([*inner, *borders], key=lambda mark: mark.update))

    def warnings(self, horizon: Horizon) -> Iterator[str]:
        total = sum(at_least_one(phase.steps, horizon, "steps") for phase in self.phases)
        if total != horizon.num_steps:
            yield (
                f"the phases sum to {total} updates, the run has {horizon.num_steps}: "
                f"what is over is cut, what is missing holds the last phase's end"
            )

    def _parts(self, horizon: Horizon) -> list[tuple[int, float, LRSchedule]]:
        """Start, scale and schedule of each phase."""
        parts, start = [], 0
        for phase in self.phases:
            length = at_least_one(phase.steps, horizon, "steps")
            schedule = phase.schedule.resolve(Horizon(length, horizon.steps_per_epoch))
            if schedule.feedback is not None:
                raise ScheduleError("a phase cannot wait for the validation loss: use plateau alone")
            parts.append((start, phase.scale, schedule))
            start += length
        return parts


ROWS: dict[str, type[ScheduleOptions]] = {
    kind.model_fields["type"].default: kind
    for kind in (
        curves.Constant,
        curves.ConstantWithWarmup,
        curves.Linear,
        curves.Cosine,
        curves.CosineWithRestarts,
        curves.Polynomial,
        cycles.CosineAnnealing,
        cycles.CosineWarmRestarts,
        curves.Exponential,
        curves.Step,
        curves.MultiStep,
        curves.PiecewiseConstant,
        curves.InverseSqrt,
        curves.WarmupStableDecay,
        curves.Rex,
        cycles.OneCycle,
        cycles.Cyclic,
        curves.Plateau,
        Phases,
        TorchSchedule,
        cycles.Ramp,
    )
}
"""The class of options, which holds the formula, of each name in the config (`lr_scheduler.type`)."""
CLASSIC = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
"""The six of the Stable Diffusion trainers, which are previewed together."""
HIDDEN = frozenset((cycles.Ramp,))
"""In no list, page or suggestion: of use to the program alone."""
SCHEDULES = {name: kind for name, kind in ROWS.items() if kind not in HIDDEN}


def _tag(value: Any) -> str | None:
    """The member of the union: a name of ours, `plugin` for an installed one or a function, else what is written."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind is None:
        return None
    name = str(kind)
    return "plugin" if name not in ROWS and (":" in name or name in plugin_names()) else name


if TYPE_CHECKING:
    LRSchedulerOptions = ScheduleOptions
else:
    _members = [Annotated[kind, Tag(name)] for name, kind in ROWS.items()] + [Annotated[PluginSchedule, Tag("plugin")]]
    LRSchedulerOptions = Annotated[reduce(operator.or_, _members), Discriminator(_tag)]
Phase.model_rebuild()
Phases.model_rebuild()
