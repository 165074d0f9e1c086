"""What a schedule is: a pure function of the update's index, laid over one run by the options of its type.

Update k (0-based, completed updates only) uses `base_lr * multiplier(k, base_lr)`. Nothing else moves the learning
rate: no wrapper steps it, so process count, accumulation, skipped updates and resumes cannot bend the curve. Lengths
are written in the units people think in: updates (100), epochs ("2ep") or a share of the run ("5%"). At the foot: what
a schedule amounts to over one run, in numbers and in warnings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from lora_trainer.strict_model import NotBool, Ratio, StrictModel

Core = Callable[[int, float], float]  # (update index, base LR) -> multiplier
NEGLIGIBLE = 1e-3  # a multiplier under which an update trains next to nothing
NEGLIGIBLE_SHARE = 0.1
_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>ep|%)")


class ScheduleError(ValueError):
    """The options cannot be laid over this run; the message says why and what to write."""


@dataclass(frozen=True, slots=True)
class Horizon:
    """What a run is measured against: N optimizer updates in all, and how many of them make an epoch."""

    num_steps: int
    steps_per_epoch: int


def check_duration(value: Any) -> Any:
    """Accept a whole number >= 0 (as 100 or 1e2), "2ep" or "5%".

    Raises:
        ValueError: it is none of these.
    """
    whole = isinstance(value, float) and value.is_integer()
    if whole or (isinstance(value, int) and not isinstance(value, bool)):
        if value < 0:
            raise ValueError("a length is not negative")
        return int(value)
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        share = isinstance(value, float) and 0 < value < 1
        meant = f'; {value:g} of the run is "{100 * value:g}%"' if share else ""
        raise ValueError(f'a length is a whole number of updates (100), epochs ("2ep") or a percentage ("5%"){meant}')
    if match["unit"] == "%" and float(match["number"]) > 100:
        raise ValueError("a percentage of the run is at most 100%")
    return value.strip()


def check_period(value: Any) -> Any:
    """Accept a duration that is not 0, or None.

    Raises:
        ValueError: it is 0.
    """
    if value is not None and check_duration(value) in (0, "0%", "0ep"):
        raise ValueError("a period is at least 1; write null for never")
    return value


Duration = Annotated[int | str, BeforeValidator(check_duration)]


def to_steps(duration: int | str, horizon: Horizon) -> int:
    """The duration in optimizer updates: rounded half up and at least 1, unless it is written as nothing (0)."""
    if isinstance(duration, int):
        return duration
    match = _DURATION.fullmatch(duration)
    assert match is not None, f"unchecked duration {duration!r}"
    number = float(match["number"])
    if number == 0:
        return 0
    whole = horizon.steps_per_epoch if match["unit"] == "ep" else horizon.num_steps / 100
    return max(1, math.floor(number * whole + 0.5))


def at_least_one(duration: int | str, horizon: Horizon, name: str) -> int:
    """The duration in updates.

    Raises:
        ScheduleError: it is none.
    """
    updates = to_steps(duration, horizon)
    if updates < 1:
        raise ScheduleError(f"`{name}` is at least one update")
    return updates


@dataclass(frozen=True, slots=True)
class Mark:
    """Something to see on a plot at one update."""

    update: int
    label: str


@dataclass(frozen=True, slots=True)
class Warmup:
    """The rise of the first `num_updates` updates; its first value is `start`, or 1/W with start "one"."""

    num_steps: int
    start: float | Literal["one"] = 0.0
    shape: Literal["linear", "cosine"] = "linear"

    def multiplier(self, k: int) -> float:
        share = (k + 1 if self.start == "one" else k) / max(1, self.num_steps)
        risen = share if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * share))
        low = 0.0 if self.start == "one" else float(self.start)
        return low + (1 - low) * risen


PairedRise = Callable[[Sequence[float], Sequence[float]], float]
"""From (before, now), a value per image each: by how many standard errors their mean rose."""


@dataclass
class PlateauFeedback:
    """What a plateau schedule has seen and done so far.

    Its recorded reductions are its whole state, so the LR of any update is still a function of the update's index, and
    a resume repeats it. What it is fed is the low-noise probe, never the training loss.
    """

    factor: float
    patience: int
    threshold_se: float
    min_ratio: float
    reductions: list[int] = field(default_factory=list)
    """Updates from which one more factor holds."""
    best: list[float] | None = None
    """The probe's value of each image when it was last clearly better."""
    bad: int = 0

    def multiplier(self, k: int, _: float) -> float:
        """The factor on the base LR at update k."""
        return max(self.min_ratio, self.factor ** sum(update <= k for update in self.reductions))

    def observe(self, step: int, items: Sequence[float], rise: PairedRise) -> bool:
        """Look at a probe after `step` completed updates; whether the LR falls from the next update on."""
        if all(map(math.isfinite, items)) and (self.best is None or rise(self.best, items) < -self.threshold_se):
            self.best, self.bad = list(items), 0
            return False
        self.bad += 1
        if self.bad < self.patience:
            return False
        self.reductions.append(step)
        self.bad = 0
        return True

    def state(self) -> dict[str, Any]:
        return {"reductions": self.reductions, "best": self.best, "bad": self.bad}

    def load(self, state: dict[str, Any]) -> None:
        self.reductions, self.best, self.bad = list(state["reductions"]), state["best"], state["bad"]


@dataclass(frozen=True, slots=True)
class LRSchedule:
    """A named schedule laid over one run."""

    name: str
    horizon: Horizon
    core: Core
    warmup: Warmup
    num_cooldown_steps: int = 0
    marks: tuple[Mark, ...] = ()
    feedback: PlateauFeedback | None = None
    """Set where the schedule waits for the validation loss."""

    def multiplier(self, k: int, base_lr: float) -> float:
        """The factor on the base LR for update k; beyond the run's end the value at its end."""
        k = min(k, self.horizon.num_steps)
        if k < self.warmup.num_steps:
            return self.warmup.multiplier(k)
        value = self.core(k, base_lr)
        remaining = self.horizon.num_steps - k
        return value * remaining / self.num_cooldown_steps if remaining < self.num_cooldown_steps else value

    def lr(self, k: int, base_lr: float) -> float:
        """The learning rate of update k."""
        return base_lr * self.multiplier(k, base_lr)


class ScheduleOptions(StrictModel):
    """What every schedule type has: a name, and a way to be laid over a run."""

    type: str
    cooldown_steps: Duration = 0
    """Length of a last linear fall to zero, on top of the schedule's own shape."""

    summary: ClassVar[str]
    limits: ClassVar[str]
    example: ClassVar[dict[str, Any]] = {}
    """Options that show the schedule off: all that it requires, for previews."""

    def core(self, horizon: Horizon, warmup: int) -> Core:
        """The multiplier after the warm-up, as a function of (update index, base LR); always 1 by itself."""
        return lambda k, _: 1.0

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        """What a plot shows beside the end of the warm-up."""
        return ()

    def warnings(self, horizon: Horizon) -> Iterator[str]:
        """What is allowed over this run but probably not meant, beyond what the curve itself shows."""
        return iter(())

    def warmup_over(self, horizon: Horizon) -> Warmup:
        """The rise before the core; none unless the schedule takes a warm-up."""
        return Warmup(0)

    def resolve(self, horizon: Horizon) -> LRSchedule:
        """Lay the options over a run.

        Raises:
            ScheduleError: the options do not fit its length.
        """
        warmup = self.warmup_over(horizon)
        cooldown = to_steps(self.cooldown_steps, horizon)
        if warmup.num_steps + cooldown > horizon.num_steps:
            raise ScheduleError(
                f"warm-up ({warmup.num_steps}) and cool-down ({cooldown}) are longer than the run's "
                f"{horizon.num_steps} updates"
            )
        marks = self.marks(horizon, warmup.num_steps)
        if warmup.num_steps:
            marks = (Mark(warmup.num_steps, "End of warmup"), *marks)
        if cooldown:
            marks = (*marks, Mark(horizon.num_steps - cooldown, "Start of cooldown"))
        core = self.core(horizon, warmup.num_steps)
        in_order = tuple(sorted(marks, key=lambda mark: mark.update))
        return LRSchedule(self.type, horizon, core, warmup, cooldown, in_order)


class WarmupOptions(ScheduleOptions):
    """A schedule that may rise at first."""

    warmup_steps: Duration = 0
    """Length of the rise from zero: updates (100), epochs ("2ep") or a share of the run ("5%")."""
    warmup_shape: Literal["linear", "cosine"] = "linear"
    """Form of the rise."""
    warmup_start: Literal["zero", "one"] | Annotated[float, Field(ge=0, lt=1), NotBool] = "zero"
    """Multiplier of the first update: `zero` (as diffusers), `one` ((k+1)/W, no update is spent at 0) or a ratio."""

    def warmup_over(self, horizon: Horizon) -> Warmup:
        num_steps = to_steps(self.warmup_steps, horizon)
        if num_steps and num_steps >= horizon.num_steps:
            raise ScheduleError(
                f"a warm-up of {num_steps} updates does not fit into a run of {horizon.num_steps}: the base "
                f'learning rate would never be reached. Write a share of the run, as in warmup_steps: "5%"'
            )
        start = 0.0 if self.warmup_start == "zero" else self.warmup_start
        return Warmup(num_steps, start, self.warmup_shape)


class DecayOptions(WarmupOptions):
    """A schedule that falls over the whole rest of the run."""

    end: Literal["exclusive", "inclusive"] = "exclusive"
    """`exclusive` as diffusers: the floor is reached one update after the last; `inclusive`: at the last update."""

    def progress(self, horizon: Horizon, warmup: int) -> Callable[[int], float]:
        """The share p of the fall that is done at update k: (k - W) / (N - W), or / (N - 1 - W) inclusively."""
        length = horizon.num_steps - warmup - (1 if self.end == "inclusive" else 0)
        return lambda k: min(1.0, (k - warmup) / max(1, length))


class FlooredDecayOptions(DecayOptions):
    """A fall that may stop at a share of the base LR."""

    min_ratio: Ratio = 0.0
    """Floor as a share of the base LR; the curve is lifted onto it, the warm-up is not."""

    def floored(self, core: Callable[[float], float], horizon: Horizon, warmup: int) -> Core:
        """A core given as a function of the progress p, lifted onto the floor."""
        progress, floor = self.progress(horizon, warmup), self.min_ratio
        return lambda k, _: floor + (1 - floor) * core(progress(k))


@dataclass(frozen=True, slots=True)
class ScheduleFacts:
    """Numbers of one schedule laid over one run; `warnings` is empty where nothing looks like a mistake."""

    lrs: tuple[float, ...]
    """LR of each update."""
    budget: float
    """Mean multiplier: the share of constant training at the base LR that the run amounts to."""
    half_life: int | None
    """Updates after the peak until the LR is at most half of it; None if it never is."""
    warnings: tuple[str, ...]

    @property
    def peak(self) -> float:
        return max(self.lrs)

    def shrink(self, weight_decay: float) -> float:
        """Share by which decoupled weight decay alone shrinks a weight over the run: 1 - exp(-wd x sum of LRs)."""
        return 1 - math.exp(-weight_decay * math.fsum(self.lrs))


def facts_of(options: ScheduleOptions, schedule: LRSchedule, base_lr: float) -> ScheduleFacts:
    """Tabulate a schedule and look at it.

    Raises:
        ScheduleError: an absolute end does not fit the base LR.
    """
    lrs = tuple(schedule.lr(k, base_lr) for k in range(schedule.horizon.num_steps))
    top = lrs.index(max(lrs))
    return ScheduleFacts(
        lrs=lrs,
        budget=math.fsum(lrs) / (base_lr * len(lrs)),
        half_life=next((k for k, lr in enumerate(lrs[top:]) if lr <= lrs[top] / 2), None),
        warnings=tuple(_warnings(options, schedule, [lr / base_lr for lr in lrs])),
    )


def _warnings(options: ScheduleOptions, schedule: LRSchedule, multipliers: Sequence[float]) -> Iterator[str]:
    """What is allowed but probably not meant."""
    num_steps, warmup = len(multipliers), schedule.warmup
    if warmup.num_steps > num_steps / 2:
        yield f"the warm-up takes {warmup.num_steps} of {num_steps} updates, more than half of the run"
    if warmup.num_steps == 1 and multipliers[0] == 0:
        yield "a warm-up of one update only loses it: its LR is 0 (warmup_start: one would use it)"
    if num_steps > 1 and multipliers[-1] > multipliers[-2] and num_steps - 1 > warmup.num_steps:
        yield "the LR is rising when training ends"
    negligible = sum(m < NEGLIGIBLE for m in multipliers[warmup.num_steps :])
    if negligible > NEGLIGIBLE_SHARE * num_steps:
        start = next(k for k in range(warmup.num_steps, num_steps) if multipliers[k] < NEGLIGIBLE)
        yield (
            f"{negligible} of {num_steps} updates (from {start} on) have less than a thousandth of the base LR: "
            f"they train next to nothing"
        )
    yield from options.warnings(schedule.horizon)
