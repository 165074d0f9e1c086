"""The six schedules of the Stable Diffusion trainers, equal to diffusers.optimization.get_scheduler at every update.

Formulas: diffusers `optimization.py`, where p is the share of the fall that is done.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_trainer.schedules.durations import Duration, Horizon, ScheduleError
from lora_trainer.schedules.options import DecayOptions, FlooredDecayOptions, ScheduleOptions, WarmupOptions
from lora_trainer.schedules.schedule import Core, Mark
from lora_trainer.strict_model import Count, NotBool, Ratio


class Constant(ScheduleOptions):
    """m = 1: the base LR at every update."""

    type: Literal["constant"] = "constant"
    summary: ClassVar[str] = "the same learning rate from the first update to the last"
    limits: ClassVar[str] = "never settles: late updates are as large as early ones, and small sets overfit easily"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        return lambda k, _: 1.0


class ConstantWithWarmup(WarmupOptions):
    """m = k / W in the warm-up, then 1."""

    type: Literal["constant_with_warmup"] = "constant_with_warmup"
    warmup_steps: Duration
    """Length of the rise: updates (100), epochs ("2ep") or a share of the run ("5%"). Required."""
    example: ClassVar[dict[str, Any]] = {"warmup_steps": "10%"}
    summary: ClassVar[str] = "a rise from zero, then the same learning rate to the end"
    limits: ClassVar[str] = "protects the start, but never settles at the end"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        return lambda k, _: 1.0


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
    num_cycles: Annotated[float, Field(gt=0), NotBool] = 0.5
    """Waves over the run; 0.5 is the usual half wave that ends at the floor."""
    summary: ClassVar[str] = "slow at first, fast in the middle, slow again towards the floor"
    limits: ClassVar[str] = "the length of the run must be right from the start: the curve is laid over it"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        cycles = self.num_cycles
        return self.floored(lambda p: max(0.0, 0.5 * (1 + math.cos(math.pi * cycles * 2 * p))), horizon, warmup)


class CosineWithRestarts(FlooredDecayOptions):
    """m = (1 + cos(pi ((c p) mod 1))) / 2 with c = num_cycles: each fall starts at the base LR again."""

    type: Literal["cosine_with_restarts"] = "cosine_with_restarts"
    num_cycles: Count = 3
    """Number of half waves; there is one jump back up fewer."""
    summary: ClassVar[str] = "cosine falls, each followed by a jump back to the base learning rate"
    limits: ClassVar[str] = "for long runs on varied data; each restart undoes some of the settling before it"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        cycles = self.num_cycles

        def fall(p: float) -> float:
            return 0.0 if p >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * ((cycles * p) % 1.0))))

        return self.floored(fall, horizon, warmup)

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        length = horizon.num_updates - warmup - (1 if self.end == "inclusive" else 0)
        restarts = [warmup + math.ceil(cycle * length / self.num_cycles) for cycle in range(1, self.num_cycles)]
        return tuple(Mark(update, "Restart") for update in restarts)


class Polynomial(DecayOptions):
    """m = f + (1 - f) (1 - p) ** power, with the floor f = lr_end / base or min_ratio."""

    type: Literal["polynomial"] = "polynomial"
    power: Annotated[float, Field(gt=0), NotBool] = 1.0
    """1 is a straight line; larger falls faster at first."""
    lr_end: Annotated[float, Field(ge=0), NotBool] | None = None
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
