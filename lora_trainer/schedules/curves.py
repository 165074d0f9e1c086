"""Schedules that hold or fall: the six of the Stable Diffusion trainers, other decays, and one that waits for the loss.

The six equal diffusers.optimization.get_scheduler at every update; p is the share of the fall that is done. Elsewhere
lengths (step size, half-life) count from the end of the warm-up, so that the curve has no jump there; milestones and
boundaries are absolute updates of the run. Formulas: diffusers and transformers `optimization.py`,
torch.optim.lr_scheduler, and Chen et al. 2021 for REX (arXiv 2107.04197).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_trainer.schedules.schedule import (
    Core,
    DecayOptions,
    Duration,
    FlooredDecayOptions,
    Horizon,
    LRSchedule,
    Mark,
    PlateauFeedback,
    ScheduleError,
    ScheduleOptions,
    WarmupOptions,
    at_least_one,
    to_steps,
)
from lora_trainer.strict_model import Count, NotBool, NotNegative, Positive, Ratio

Factor = Annotated[float, Field(gt=0, le=1), NotBool]


class Constant(ScheduleOptions):
    """m = 1: the base LR at every update."""

    type: Literal["constant"] = "constant"
    summary: ClassVar[str] = "the same learning rate from the first update to the last"
    limits: ClassVar[str] = "never settles: late updates are as large as early ones, and small sets overfit easily"


class ConstantWithWarmup(WarmupOptions):
    """m = k / W in the warm-up, then 1."""

    type: Literal["constant_with_warmup"] = "constant_with_warmup"
    warmup_steps: Duration
    """Length of the rise: updates (100), epochs ("2ep") or a share of the run ("5%"). Required."""
    example: ClassVar[dict[str, Any]] = {"warmup_steps": "10%"}
    summary: ClassVar[str] = "a rise from zero, then the same learning rate to the end"
    limits: ClassVar[str] = "protects the start, but never settles at the end"


class Linear(FlooredDecayOptions):
    """m = 1 - p: a straight line down."""

    type: Literal["linear"] = "linear"
    summary: ClassVar[str] = "a straight line from the base learning rate down to the floor"
    limits: ClassVar[str] = "the learning rate may be too low for much of the second half"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        return self.floored(lambda p: 1 - p, horizon, warmup)


class Cosine(FlooredDecayOptions):
    """m = (1 + cos(2 pi c p)) / 2 with c = num_cycles = 0.5: half a wave down."""

    type: Literal["cosine"] = "cosine"
    num_cycles: Positive = 0.5
    """Waves over the run; 0.5 is the usual half wave that ends at the floor."""
    summary: ClassVar[str] = "slow at first, fast in the middle, slow again towards the floor"
    limits: ClassVar[str] = "the length of the run must be right from the start: the curve is laid over it"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        return self.floored(
            lambda p: max(0.0, 0.5 * (1 + math.cos(math.pi * self.num_cycles * 2 * p))), horizon, warmup
        )


class CosineWithRestarts(FlooredDecayOptions):
    """m = (1 + cos(pi ((c p) mod 1))) / 2 with c = num_cycles: each fall starts at the base LR again."""

    type: Literal["cosine_with_restarts"] = "cosine_with_restarts"
    num_cycles: Count = 3
    """Number of half waves; there is one jump back up fewer."""
    summary: ClassVar[str] = "cosine falls, each followed by a jump back to the base learning rate"
    limits: ClassVar[str] = "for long runs on varied data; each restart undoes some of the settling before it"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        def fall(p: float) -> float:
            return 0.0 if p >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * ((self.num_cycles * p) % 1.0))))

        return self.floored(fall, horizon, warmup)

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        length = horizon.num_steps - warmup - (1 if self.end == "inclusive" else 0)
        restarts = [warmup + math.ceil(cycle * length / self.num_cycles) for cycle in range(1, self.num_cycles)]
        return tuple(Mark(update, "Restart") for update in restarts)

    def warnings(self, horizon: Horizon) -> Iterator[str]:
        if self.num_cycles == 1:
            yield "cosine_with_restarts with one cycle never restarts: it is plain cosine"


class Polynomial(DecayOptions):
    """m = f + (1 - f) (1 - p) ** power, with the floor f = lr_end / base or min_ratio."""

    type: Literal["polynomial"] = "polynomial"
    power: Positive = 1.0
    """1 is a straight line; larger falls faster at first."""
    lr_end: NotNegative | None = None
    """Absolute learning rate at the end (1e-7 where neither this nor `min_ratio` is given)."""
    min_ratio: Ratio | None = None
    """Floor as a share of the base LR, in place of `lr_end`."""
    example: ClassVar[dict[str, Any]] = {"power": 2}
    summary: ClassVar[str] = "a fall whose speed is set by an exponent"
    limits: ClassVar[str] = "one more number to choose; with power 1 it is `linear`"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        if self.lr_end is not None and self.min_ratio is not None:
            raise ScheduleError("polynomial takes `lr_end` or `min_ratio`, not both: remove one of them")
        progress = self.progress(horizon, warmup)

        def fall(k: int, base_lr: float) -> float:
            floor = self._floor(base_lr)
            return floor + (1 - floor) * (1 - progress(k)) ** self.power

        return fall

    def _floor(self, base_lr: float) -> float:
        if self.min_ratio is not None:
            return self.min_ratio
        lr_end = 1e-7 if self.lr_end is None else self.lr_end
        if lr_end >= base_lr:
            raise ScheduleError(
                f"polynomial ends at lr_end {lr_end:g}, which is not below the base learning rate {base_lr:g}: "
                f"lower `lr_end` or write `min_ratio`"
            )
        return lr_end / base_lr


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
        per_unit = 1 if self.unit == "step" else horizon.steps_per_epoch
        return lambda k, _: math.exp(-decay * ((k - warmup) // per_unit))

    def _decay(self, horizon: Horizon, warmup: int) -> float:
        """The rate per unit."""
        length = horizon.num_steps - warmup
        units = length if self.unit == "step" else math.ceil(length / horizon.steps_per_epoch)
        rates: dict[str, Callable[[float], float]] = {
            "gamma": lambda gamma: -math.log(gamma),
            "rate": lambda rate: rate,
            "final_ratio": lambda ratio: -math.log(ratio) / max(1, units),
            "half_life": lambda half_life: math.log(2) / half_life,
        }
        given = {name: value for name in rates if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ScheduleError(
                "exponential takes exactly one of gamma, rate, final_ratio and half_life; "
                f"here: {', '.join(given) or 'none'}"
            )
        ((name, value),) = given.items()
        return rates[name](value)


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
        return _milestones(range(warmup + size, horizon.num_steps, size))


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
        return _milestones(_ascending(self.milestones, horizon, "milestones"))


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
        return _milestones(_ascending(self.boundaries, horizon, "boundaries"))


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
        start = horizon.num_steps - length
        if start < warmup:
            raise ScheduleError(
                f"warm-up ({warmup}) and decay ({length}) are longer than the run's {horizon.num_steps} updates"
            )
        shape, floor = _FALLS[self.decay_shape], self.min_ratio
        return lambda k, _: 1.0 if k < start else floor + (1 - floor) * shape((k - start) / length)

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        return (Mark(horizon.num_steps - at_least_one(self.decay_steps, horizon, "decay_steps"), "Start of decay"),)


class Rex(FlooredDecayOptions):
    """m = (1 - p) / ((1 - d) + d (1 - p)): late and steep."""

    type: Literal["rex"] = "rex"
    d: Annotated[float, Field(ge=0, lt=1), NotBool] = 0.9
    """0 is a straight line; near 1 the LR stays high and falls at the very end."""
    summary: ClassVar[str] = "stays high for long and falls steeply at the end"
    limits: ClassVar[str] = "spends little time at small learning rates"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        return self.floored(lambda p: (1 - p) / ((1 - self.d) + self.d * (1 - p)), horizon, warmup)


class Plateau(WarmupOptions):
    """m = factor ** (reductions so far); one reduction after `patience` probes without a clear improvement."""

    type: Literal["plateau"] = "plateau"
    factor: Annotated[float, Field(gt=0, lt=1), NotBool] = 0.5
    """Factor of each reduction."""
    patience: Count = 3
    """Probes without improvement before a reduction."""
    threshold_se: NotNegative = 2.0
    """Standard errors (paired over the probe's images) by which a probe must be better to count."""
    min_ratio: Ratio = 0.0
    """Floor as a share of the base LR."""
    summary: ClassVar[str] = "constant until the validation loss stops falling, then lower"
    limits: ClassVar[str] = "needs a validation section; on a short run it may never act"

    def resolve(self, horizon: Horizon) -> LRSchedule:
        feedback = PlateauFeedback(self.factor, self.patience, self.threshold_se, self.min_ratio)
        return replace(super().resolve(horizon), core=feedback.multiplier, feedback=feedback)


_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def _ascending(durations: tuple[int | str, ...], horizon: Horizon, name: str) -> list[int]:
    """Absolute updates, checked to ascend inside the run."""
    updates = [to_steps(duration, horizon) for duration in durations]
    if any(second <= first for first, second in itertools.pairwise(updates)):
        raise ScheduleError(f"`{name}` ascend, each once; here: {updates}")
    if updates[0] < 1 or updates[-1] >= horizon.num_steps:
        raise ScheduleError(f"`{name}` lie inside the run of {horizon.num_steps} updates; here: {updates}")
    return updates


def _milestones(updates: Iterable[int]) -> tuple[Mark, ...]:
    return tuple(Mark(k, f"Milestone at step {k}") for k in updates)
