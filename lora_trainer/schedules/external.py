"""Schedules from elsewhere: torch's and the libraries', entry points, functions by path. Tabulated before a run starts.

Whatever they do inside, a run sees a table of multipliers, one per update, checked finite and not negative.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal

from pydantic import Field

from lora_trainer.schedules.schedule import Core, Horizon, ScheduleError, ScheduleOptions

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
        module, _, attribute = name.partition(":")
        return getattr(importlib.import_module(module), attribute)
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
