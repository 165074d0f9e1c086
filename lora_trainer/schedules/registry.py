"""Every learning-rate schedule, one row each: the union of the config, the known names and the docs follow from it.

Schedules from elsewhere, torch's and the libraries', entry points (docs/extending.md) and functions by path, are
tabulated before a run starts: whatever they do inside, a run sees multipliers, checked finite and not negative.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache, reduce
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from lora_trainer.schedules import curves, cycles
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

ENTRY_POINTS = "lora_trainer.lr_schedules"
LIBRARIES = ("transformers.optimization", "diffusers.optimization")
"""Where a `torch` target may be a function (optimizer, **args) -> torch scheduler."""
_allowed = False
Plugin = Callable[..., Callable[[int], float]]  # (num_updates, updates_per_epoch, **args) -> (update -> multiplier)


class TorchSchedule(ScheduleOptions):
    """m = the LR of the torch scheduler after k steps, as a share of the base. Previewing it loads torch."""

    type: Literal["torch"] = "torch"
    target: str = Field(min_length=1)
    """A class of torch.optim.lr_scheduler (`ExponentialLR`), or a function of transformers.optimization or
    diffusers.optimization by its whole path; any other path needs `--allow-plugins`. Required."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Its arguments. The texts `num_updates` and `updates_per_epoch` stand for the run's own numbers."""
    example: ClassVar[dict[str, Any]] = {"target": "CosineAnnealingLR", "args": {"T_max": "num_updates"}}
    summary: ClassVar[str] = "whatever the torch scheduler does, looked up instead of stepped"
    limits: ClassVar[str] = "one that waits for a metric cannot be tabulated: use plateau"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        table = cache(lambda base_lr: self._tabulate(horizon, base_lr))
        return lambda k, base_lr: table(base_lr)[min(k, horizon.num_steps - 1)]

    def _tabulate(self, horizon: Horizon, base_lr: float) -> list[float]:
        import torch

        kind = _torch_class(self.target)
        numbers = {"num_updates": horizon.num_steps, "updates_per_epoch": horizon.steps_per_epoch}
        args = {key: numbers.get(value, value) if isinstance(value, str) else value for key, value in self.args.items()}
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=base_lr)
        try:
            scheduler = kind(optimizer, **args)
            lrs = []
            for _ in range(horizon.num_steps):
                lrs.append(float(optimizer.param_groups[0]["lr"]) / base_lr)
                optimizer.step()
                scheduler.step()
        except Exception as error:
            raise ScheduleError(f"{self.target} does not take these args: {error}") from error
        return checked(lrs, self.target)


class PluginSchedule(ScheduleOptions):
    """m = function(num_updates, updates_per_epoch, **args)(k): an entry point's name, or `package.module:function`."""

    type: str
    args: dict[str, Any] = Field(default_factory=dict)
    """Given to the function as keyword arguments, after `num_updates` and `updates_per_epoch`."""
    example: ClassVar[dict[str, Any]] = {"type": "my_package.schedules:sawtooth", "args": {"low": 0.2}}
    summary: ClassVar[str] = "a schedule of your own"
    limits: ClassVar[str] = "a pure function of the update, finite and not negative everywhere: checked before the run"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        function = load_plugin(self.type)
        try:
            multiplier = function(num_updates=horizon.num_steps, updates_per_epoch=horizon.steps_per_epoch, **self.args)
            values = [float(multiplier(k)) for k in range(horizon.num_steps)]
        except Exception as error:
            raise ScheduleError(f"{self.type} does not take these args: {error}") from error
        table = checked(values, self.type)
        return lambda k, _: table[min(k, horizon.num_steps - 1)]


def allow_plugins(allowed: bool) -> None:
    """Whether code that a configuration names by its path, and nobody installed for this, may run from now on."""
    global _allowed
    _allowed = allowed


def _refuse_code(name: str) -> None:
    if not _allowed:
        raise ScheduleError(f"`{name}` is code that this configuration would run: add --allow-plugins if you trust it")


def plugin_names() -> list[str]:
    """Schedules that installed packages offer under the entry point group `lora_trainer.lr_schedules`."""
    return sorted(entry.name for entry in entry_points(group=ENTRY_POINTS))


def load_plugin(name: str) -> Plugin:
    """The function behind an entry point's name or a `package.module:function`.

    Raises:
        ScheduleError: it cannot be imported.
    """
    try:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            return entry.load()
        _refuse_code(name)
        return pkgutil.resolve_name(name)
    except ScheduleError:
        raise
    except Exception as error:  # also whatever a module raises while it is imported
        raise ScheduleError(f"the schedule `{name}` cannot be imported: {error}") from error


def checked(multipliers: list[float], name: str) -> list[float]:
    """The same table, if every value can be a learning rate.

    Raises:
        ScheduleError: naming the first update whose value cannot.
    """
    for k, value in enumerate(multipliers):
        if not math.isfinite(value) or value < 0:
            raise ScheduleError(f"{name} gives {value} at update {k}: a multiplier is finite and not negative")
    return multipliers


def _torch_class(target: str) -> Any:
    import torch

    module, _, name = target.rpartition(".")
    module = module or "torch.optim.lr_scheduler"
    if module not in ("torch.optim.lr_scheduler", *LIBRARIES):
        _refuse_code(target)
    try:
        scheduler = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ScheduleError(f"there is no torch scheduler `{target}`: {error}") from error
    if module in LIBRARIES and inspect.isfunction(scheduler) and scheduler.__module__ == module:
        return scheduler
    if not (isinstance(scheduler, type) and issubclass(scheduler, torch.optim.lr_scheduler.LRScheduler)):
        raise ScheduleError(f"`{target}` is no torch LR scheduler")
    if issubclass(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ScheduleError("ReduceLROnPlateau waits for a metric and cannot be tabulated: use type: plateau")
    return scheduler


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
