"""A schedule that waits for the validation loss: the LR falls where the probe no longer does.

Its recorded reductions are its whole state, so the LR of any update is still a function of the update's index, and a
resume repeats it. What it is fed is the low-noise probe, never the training loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_trainer.schedules.schedule import Core, Horizon, LRSchedule, PairedRise, WarmupOptions
from lora_trainer.strict_model import Count, NotBool, NotNegative, Ratio


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

    def core(self, horizon: Horizon, warmup: int) -> Core:
        return lambda k, _: 1.0


@dataclass
class PlateauFeedback:
    """What a plateau schedule has seen and done so far."""

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
