"""Options shared by the schedules: warm-up, cool-down and the way a curve ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_trainer.schedules.durations import Duration, Horizon, ScheduleError, to_updates
from lora_trainer.schedules.schedule import Core, LRSchedule, Mark, Warmup
from lora_trainer.strict_model import NotBool, Ratio, Section


class ScheduleOptions(Section):
    """What every schedule type has: a name, and a way to be laid over a run."""

    type: str
    cooldown_steps: Duration = 0
    """Length of a last linear fall to zero, on top of the schedule's own shape."""

    summary: ClassVar[str]
    limits: ClassVar[str]
    example: ClassVar[dict[str, Any]] = {}
    """Options that show the schedule off: all that it requires, for previews."""

    @abstractmethod
    def core(self, horizon: Horizon, warmup: int) -> Core:
        """The multiplier after the warm-up, as a function of (update index, base LR)."""

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        """What a plot shows beside the end of the warm-up."""
        return ()

    def warmup_over(self, horizon: Horizon) -> Warmup:
        return Warmup(0)

    def resolve(self, horizon: Horizon) -> LRSchedule:
        """Lay the options over a run.

        Raises:
            ScheduleError: the options do not fit its length.
        """
        warmup = self.warmup_over(horizon)
        cooldown = to_updates(self.cooldown_steps, horizon)
        if warmup.num_updates + cooldown > horizon.num_updates:
            raise ScheduleError(
                f"warm-up ({warmup.num_updates}) and cool-down ({cooldown}) are longer than the run's "
                f"{horizon.num_updates} updates"
            )
        marks = self.marks(horizon, warmup.num_updates)
        if warmup.num_updates:
            marks = (Mark(warmup.num_updates, "End of warmup"), *marks)
        if cooldown:
            marks = (*marks, Mark(horizon.num_updates - cooldown, "Start of cooldown"))
        core = self.core(horizon, warmup.num_updates)
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
        num_updates = to_updates(self.warmup_steps, horizon)
        if num_updates and num_updates >= horizon.num_updates:
            raise ScheduleError(
                f"a warm-up of {num_updates} updates does not fit into a run of {horizon.num_updates}: the base "
                f'learning rate would never be reached. Write a share of the run, as in warmup_steps: "5%"'
            )
        start = 0.0 if self.warmup_start == "zero" else self.warmup_start
        return Warmup(num_updates, start, self.warmup_shape)


class DecayOptions(WarmupOptions):
    """A schedule that falls over the whole rest of the run."""

    end: Literal["exclusive", "inclusive"] = "exclusive"
    """`exclusive` as diffusers: the floor is reached one update after the last; `inclusive`: at the last update."""

    def progress(self, horizon: Horizon, warmup: int) -> Callable[[int], float]:
        """The share p of the fall that is done at update k: (k - W) / (N - W), or / (N - 1 - W) inclusively."""
        length = horizon.num_updates - warmup - (1 if self.end == "inclusive" else 0)
        return lambda k: min(1.0, (k - warmup) / max(1, length))


class FlooredDecayOptions(DecayOptions):
    """A fall that may stop at a share of the base LR."""

    min_ratio: Ratio = 0.0
    """Floor as a share of the base LR; the curve is lifted onto it, the warm-up is not."""

    def floored(self, core: Callable[[float], float], horizon: Horizon, warmup: int) -> Core:
        """A core given as a function of the progress p, lifted onto the floor."""
        progress, floor = self.progress(horizon, warmup), self.min_ratio
        return lambda k, _: floor + (1 - floor) * core(progress(k))
