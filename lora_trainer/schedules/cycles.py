"""Schedules that rise again: cosine annealing, warm restarts, one cycle, triangles; and the LR finder's ramp.

Formulas: torch.optim.lr_scheduler (CosineAnnealingLR, CosineAnnealingWarmRestarts, OneCycleLR, CyclicLR); periods count
from the end of the warm-up.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_trainer.schedules.schedule import (
    Core,
    Duration,
    Horizon,
    Mark,
    ScheduleError,
    ScheduleOptions,
    WarmupOptions,
    at_least_one,
)
from lora_trainer.strict_model import Count, NotBool, NotNegative, Positive, Ratio


class CosineAnnealing(WarmupOptions):
    """m = eta + (1 - eta) (1 + cos(pi t / T)) / 2 with T = t_max, eta = eta_min / base: down in T updates, up in T."""

    type: Literal["cosine_annealing"] = "cosine_annealing"
    t_max: Duration
    """Updates from the top to the bottom; after it the LR rises again. Required."""
    eta_min: NotNegative = 0.0
    """Absolute learning rate at the bottom."""
    example: ClassVar[dict[str, Any]] = {"t_max": "100%"}
    summary: ClassVar[str] = "a periodic cosine: down in t_max updates, up in the next"
    limits: ClassVar[str] = "not `cosine`: past t_max the learning rate climbs, perhaps just when training ends"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        half = at_least_one(self.t_max, horizon, "t_max")

        def wave(k: int, base_lr: float) -> float:
            low = _floor(self.eta_min, base_lr)
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (k - warmup) / half))

        return wave

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        half = at_least_one(self.t_max, horizon, "t_max")
        return tuple(Mark(k, "LR rises again") for k in range(warmup + half, horizon.num_steps, 2 * half))


class CosineWarmRestarts(WarmupOptions):
    """m = decay^i (1 + cos(pi s)) / 2 over the floor, s = share of cycle i, which is t_0 t_mult^i updates long.

    SGDR, Loshchilov and Hutter 2017; torch's CosineAnnealingWarmRestarts, which has no decay.
    """

    type: Literal["cosine_warm_restarts"] = "cosine_warm_restarts"
    t_0: Duration
    """Updates of the first cycle. Required."""
    t_mult: Count = 1
    """Factor by which each cycle is longer than the one before."""
    decay: Annotated[float, Field(gt=0, le=1), NotBool] = 1.0
    """Factor by which each cycle's top is lower than the one before."""
    eta_min: NotNegative = 0.0
    """Absolute learning rate at the bottom."""
    example: ClassVar[dict[str, Any]] = {"t_0": "25%", "decay": 0.7}
    summary: ClassVar[str] = "cosine falls of growing length, each from the top again"
    limits: ClassVar[str] = "ends wherever the run cuts the last cycle"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        first = at_least_one(self.t_0, horizon, "t_0")

        def fall(k: int, base_lr: float) -> float:
            cycle, start, length = 0, 0, first
            while k - warmup >= start + length:
                cycle, start, length = cycle + 1, start + length, length * self.t_mult
            low = _floor(self.eta_min, base_lr)
            top = self.decay**cycle
            share = (k - warmup - start) / length
            return low + max(0.0, top - low) * 0.5 * (1 + math.cos(math.pi * share))

        return fall

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        marks, length = [], at_least_one(self.t_0, horizon, "t_0")
        update = warmup + length
        while update < horizon.num_steps:
            marks.append(Mark(update, "Restart"))
            length *= self.t_mult
            update += length
        return tuple(marks)


class OneCycle(ScheduleOptions):
    """m rises from 1 / div_factor to 1 by half a cosine, then falls by another to 1 / (div_factor final_div_factor).

    Smith and Topin 2018; torch's OneCycleLR without its cycling of the momentum.
    """

    type: Literal["one_cycle"] = "one_cycle"
    pct_start: Annotated[float, Field(gt=0, lt=1), NotBool] = 0.3
    """Share of the run in which the LR rises."""
    div_factor: Annotated[float, Field(ge=1), NotBool] = 25.0
    """The first LR is base / div_factor."""
    final_div_factor: Annotated[float, Field(ge=1), NotBool] = 1e4
    """The last LR is base / (div_factor x final_div_factor)."""
    summary: ClassVar[str] = "one rise, one fall: the warm-up and the decay are one curve"
    limits: ClassVar[str] = "the base learning rate is its peak, and may be larger than elsewhere"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        last = horizon.num_steps - 1
        top = min(max(self.pct_start * horizon.num_steps - 1, 0.0), float(last))
        start, end = 1 / self.div_factor, 1 / (self.div_factor * self.final_div_factor)

        def cycle(k: int, _: float) -> float:
            k = min(k, last)
            if k <= top and top > 0:
                return _cosine(start, 1.0, k / top)
            return _cosine(1.0, end, (k - top) / max(1e-12, last - top))

        return cycle

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        return (Mark(max(0, round(self.pct_start * horizon.num_steps) - 1), "Peak"),)


class Cyclic(ScheduleOptions):
    """m = base_ratio + (1 - base_ratio) h, h = height of triangles that rise over step_size_up updates (Smith 2017)."""

    type: Literal["cyclic"] = "cyclic"
    step_size_up: Duration
    """Updates from the low to the base LR; the way down takes as many. Required."""
    base_ratio: Ratio
    """The low, as a share of the base LR. Required."""
    mode: Literal["triangular", "triangular2"] = "triangular"
    """`triangular2` halves each triangle's height."""
    example: ClassVar[dict[str, Any]] = {"step_size_up": "25%", "base_ratio": 0.1}
    summary: ClassVar[str] = "up and down in straight lines, again and again"
    limits: ClassVar[str] = "ends wherever the run cuts the last triangle"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        up, low = at_least_one(self.step_size_up, horizon, "step_size_up"), self.base_ratio

        def triangle(k: int, _: float) -> float:
            cycle = math.floor(1 + k / (2 * up))
            height = max(0.0, 1 - abs(k / up - 2 * cycle + 1))
            shrink = 1.0 if self.mode == "triangular" else 0.5 ** (cycle - 1)
            return low + (1 - low) * height * shrink

        return triangle


class Ramp(ScheduleOptions):
    """m = start_ratio^(1 - s) end_ratio^s with s = k / (N - 1): the same factor from each update to the next."""

    type: Literal["ramp"] = "ramp"
    start_ratio: Positive
    """Multiplier of the first update. Required."""
    end_ratio: Positive
    """Multiplier of the last update. Required."""
    example: ClassVar[dict[str, Any]] = {"start_ratio": 0.01, "end_ratio": 1.0}
    summary: ClassVar[str] = "a geometric rise through all learning rates that may be of use (Smith 2017)"
    limits: ClassVar[str] = "finds a learning rate and trains nothing well"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        start, end, last = math.log(self.start_ratio), math.log(self.end_ratio), horizon.num_steps - 1

        def ramp(k: int, _: float) -> float:
            if k == 0 or k >= last:  # the ends as they were given, without a rounding through their logarithms
                return self.start_ratio if k == 0 else self.end_ratio
            share = k / last
            return math.exp((1 - share) * start + share * end)

        return ramp


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def _floor(eta_min: float, base_lr: float) -> float:
    """An absolute learning rate as a share of the base."""
    if eta_min > base_lr:
        raise ScheduleError(f"eta_min {eta_min:g} lies above the base learning rate {base_lr:g}: lower `eta_min`")
    return eta_min / base_lr
