"""What a schedule amounts to over one run, in numbers and in warnings. Pure arithmetic on the tabulated curve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_trainer.schedules.schedule import LRSchedule, ScheduleError, ScheduleOptions

NEGLIGIBLE = 1e-3  # a multiplier under which an update trains next to nothing
NEGLIGIBLE_SHARE = 0.1


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

    @property
    def first(self) -> float:
        return self.lrs[0]

    @property
    def last(self) -> float:
        return self.lrs[-1]

    def shrink(self, weight_decay: float) -> float:
        """Share by which decoupled weight decay alone shrinks a weight over the run: 1 - exp(-wd x sum of LRs)."""
        return 1 - math.exp(-weight_decay * math.fsum(self.lrs))


def facts_of(options: ScheduleOptions, schedule: LRSchedule, base_lr: float) -> ScheduleFacts:
    """Tabulate a schedule and look at it.

    Raises:
        ScheduleError: an absolute end does not fit the base LR, or an LR is no finite number.
    """
    lrs = tuple(schedule.lr(k, base_lr) for k in range(schedule.horizon.num_steps))
    if not all(map(math.isfinite, lrs)) or math.isinf(base_lr * len(lrs)):
        raise ScheduleError("with these options its learning rates are no finite numbers")
    return ScheduleFacts(
        lrs=lrs,
        budget=math.fsum(lrs) / (base_lr * len(lrs)),
        half_life=_half_life(lrs),
        warnings=tuple(_warnings(options, schedule, [lr / base_lr for lr in lrs])),
    )


def _half_life(lrs: Sequence[float]) -> int | None:
    top = lrs.index(max(lrs))
    return next((k - top for k in range(top, len(lrs)) if lrs[k] <= lrs[top] / 2), None)


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
