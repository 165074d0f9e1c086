"""Falls that are not among the classic six: by factors, by steps, by roots, after a plateau.

Lengths (step size, half-life) count from the end of the warm-up, so that the curve has no jump there; milestones and
boundaries are absolute updates of the run. Formulas: torch.optim.lr_scheduler, transformers.optimization, and
Chen et al. 2021 for REX (arXiv 2107.04197).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_trainer.schedules.durations import Duration, Horizon, ScheduleError, at_least_one, to_updates
from lora_trainer.schedules.options import FlooredDecayOptions, ScheduleOptions, WarmupOptions
from lora_trainer.schedules.schedule import Core, Mark
from lora_trainer.strict_model import NotBool, Ratio

Positive = Annotated[float, Field(gt=0), NotBool]
Factor = Annotated[float, Field(gt=0, le=1), NotBool]
NotNegative = Annotated[float, Field(ge=0), NotBool]


class Exponential(WarmupOptions):
    """m = gamma ** t, with t in whole epochs or in updates since the warm-up."""

    type: Literal["exponential"] = "exponential"
    unit: Literal["step", "epoch"] = "epoch"
    """What t counts: whole epochs (the LR is constant inside one) or updates."""
    gamma: Factor | None = None
    """Factor per unit. Exactly one of gamma, rate, final_ratio and half_life."""
    rate: NotNegative | None = None
    """The multiplier is exp(-rate t)."""
    final_ratio: Factor | None = None
    """The multiplier at the end of the run."""
    half_life: Positive | None = None
    """Units after which the LR has halved."""
    example: ClassVar[dict[str, Any]] = {"unit": "step", "final_ratio": 0.01}
    summary: ClassVar[str] = "falls by the same factor over and over"
    limits: ClassVar[str] = "a factor per update is far faster than it looks: 0.99 halves the LR every 69 updates"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        decay = self._decay(horizon, warmup)
        per_unit = 1 if self.unit == "step" else horizon.updates_per_epoch
        return lambda k, _: math.exp(-decay * ((k - warmup) // per_unit))

    def _decay(self, horizon: Horizon, warmup: int) -> float:
        """The rate per unit."""
        given = [name for name in ("gamma", "rate", "final_ratio", "half_life") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ScheduleError(
                "exponential takes exactly one of gamma, rate, final_ratio and half_life; "
                f"here: {', '.join(given) or 'none'}"
            )
        if self.gamma is not None:
            return -math.log(self.gamma)
        if self.rate is not None:
            return self.rate
        if self.half_life is not None:
            return math.log(2) / self.half_life
        assert self.final_ratio is not None
        length = horizon.num_updates - warmup
        units = length if self.unit == "step" else math.ceil(length / horizon.updates_per_epoch)
        return -math.log(self.final_ratio) / max(1, units)


class Step(WarmupOptions):
    """m = gamma ** floor(t / step_size), with t in updates since the warm-up."""

    type: Literal["step"] = "step"
    step_size: Duration
    """Length between two drops: updates, epochs ("10ep") or a share of the run. Required."""
    gamma: Factor = 0.1
    """Factor of each drop."""
    example: ClassVar[dict[str, Any]] = {"step_size": "30%", "gamma": 0.5}
    summary: ClassVar[str] = "constant, with a drop by a factor at equal distances"
    limits: ClassVar[str] = "with many drops the last part of a run trains nothing"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        size, gamma = at_least_one(self.step_size, horizon, "step_size"), self.gamma
        return lambda k, _: gamma ** ((k - warmup) // size)

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        size = at_least_one(self.step_size, horizon, "step_size")
        return tuple(Mark(k, f"Milestone at step {k}") for k in range(warmup + size, horizon.num_updates, size))


class MultiStep(WarmupOptions):
    """m = gamma ** (number of milestones <= k)."""

    type: Literal["multistep"] = "multistep"
    milestones: Annotated[tuple[Duration, ...], Field(min_length=1)]
    """Updates of the run at which the LR drops; sorted, unique, inside the run. Required."""
    gamma: Factor = 0.1
    """Factor of each drop."""
    example: ClassVar[dict[str, Any]] = {"milestones": ["50%", "80%"], "gamma": 0.3}
    summary: ClassVar[str] = "constant, with a drop by a factor at chosen updates"
    limits: ClassVar[str] = "one must know where to drop"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        milestones, gamma = _ascending(self.milestones, horizon, "milestones"), self.gamma
        return lambda k, _: gamma ** sum(milestone <= k for milestone in milestones)

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        return tuple(Mark(k, f"Milestone at step {k}") for k in _ascending(self.milestones, horizon, "milestones"))


class PiecewiseConstant(ScheduleOptions):
    """m = values[number of boundaries <= k]."""

    type: Literal["piecewise_constant"] = "piecewise_constant"
    boundaries: Annotated[tuple[Duration, ...], Field(min_length=1)]
    """Updates of the run at which the next value begins; sorted, unique, inside the run. Required."""
    values: Annotated[tuple[NotNegative, ...], Field(min_length=2)]
    """Multipliers: one more than there are boundaries. Required."""
    example: ClassVar[dict[str, Any]] = {"boundaries": ["40%", "80%"], "values": [1, 0.3, 0.1]}
    summary: ClassVar[str] = "a staircase drawn by hand"
    limits: ClassVar[str] = "every step of it is yours to choose"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        boundaries, values = _ascending(self.boundaries, horizon, "boundaries"), self.values
        if len(values) != len(boundaries) + 1:
            raise ScheduleError(f"{len(boundaries)} boundaries need {len(boundaries) + 1} values; here: {len(values)}")
        return lambda k, _: values[sum(boundary <= k for boundary in boundaries)]

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        return tuple(Mark(k, f"Milestone at step {k}") for k in _ascending(self.boundaries, horizon, "boundaries"))


class InverseSqrt(WarmupOptions):
    """m = 1 / sqrt((k + timescale - W) / timescale), as transformers has it."""

    type: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale: Duration | None = None
    """Updates over which the fall is slow; the warm-up's length, or 10000 without one."""
    summary: ClassVar[str] = "falls with the root of time and needs no length of the run"
    limits: ClassVar[str] = "never comes near zero, so the run never settles: add cooldown_steps"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        default = warmup or 10_000
        timescale = default if self.timescale is None else at_least_one(self.timescale, horizon, "timescale")
        return lambda k, _: 1 / math.sqrt((k + timescale - warmup) / timescale)


class WarmupStableDecay(WarmupOptions):
    """m = 1, then over the last D = decay_steps updates 1 - x, (1 + cos(pi x)) / 2 or 1 - sqrt(x), x = share of D."""

    type: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay_steps: Duration = "20%"
    """Length of the last fall."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Form of the last fall."""
    min_ratio: Ratio = 0.0
    """Where it ends, as a share of the base LR."""
    summary: ClassVar[str] = "full speed for most of the run, then a fall; one trunk can feed several endings"
    limits: ClassVar[str] = "looks worse than a decaying schedule until its own fall has been run"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        length = at_least_one(self.decay_steps, horizon, "decay_steps")
        start = horizon.num_updates - length
        if start < warmup:
            raise ScheduleError(
                f"warm-up ({warmup}) and decay ({length}) are longer than the run's {horizon.num_updates} updates"
            )
        shape, floor = _FALLS[self.decay_shape], self.min_ratio
        return lambda k, _: 1.0 if k < start else floor + (1 - floor) * shape((k - start) / length)

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        return (Mark(horizon.num_updates - at_least_one(self.decay_steps, horizon, "decay_steps"), "Start of decay"),)


class Rex(FlooredDecayOptions):
    """m = (1 - p) / ((1 - d) + d (1 - p)): late and steep."""

    type: Literal["rex"] = "rex"
    d: Annotated[float, Field(ge=0, lt=1), NotBool] = 0.9
    """0 is a straight line; near 1 the LR stays high and falls at the very end."""
    summary: ClassVar[str] = "stays high for long and falls steeply at the end"
    limits: ClassVar[str] = "spends little time at small learning rates"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        d = self.d
        return self.floored(lambda p: (1 - p) / ((1 - d) + d * (1 - p)), horizon, warmup)


_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def _ascending(durations: tuple[int | str, ...], horizon: Horizon, name: str) -> list[int]:
    """Absolute updates, checked to ascend inside the run."""
    updates = [to_updates(duration, horizon) for duration in durations]
    if any(second <= first for first, second in itertools.pairwise(updates)):
        raise ScheduleError(f"`{name}` ascend, each once; here: {updates}")
    if updates[0] < 1 or updates[-1] >= horizon.num_updates:
        raise ScheduleError(f"`{name}` lie inside the run of {horizon.num_updates} updates; here: {updates}")
    return updates
