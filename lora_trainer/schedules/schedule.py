"""A learning-rate schedule: a pure function of the update's index, and what a plot should mark on it.

Update k (0-based, completed updates only) uses `base_lr * multiplier(k, base_lr)`. Nothing else moves the learning
rate: no wrapper steps it, so process count, accumulation, skipped updates and resumes cannot bend the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lora_trainer.schedules.durations import Horizon

Core = Callable[[int, float], float]  # (update index, base LR) -> multiplier


@dataclass(frozen=True, slots=True)
class Mark:
    """Something to see on a plot at one update."""

    update: int
    label: str


@dataclass(frozen=True, slots=True)
class Warmup:
    """The rise of the first `num_updates` updates; its first value is `start`, or 1/W with start "one"."""

    num_updates: int
    start: float | Literal["one"] = 0.0
    shape: Literal["linear", "cosine"] = "linear"

    def multiplier(self, k: int) -> float:
        share = (k + 1 if self.start == "one" else k) / max(1, self.num_updates)
        risen = share if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * share))
        low = 0.0 if self.start == "one" else float(self.start)
        return low + (1 - low) * risen


class Feedback(Protocol):
    """A schedule's ear to the probe, and its memory of what it did."""

    def observe(self, step: int, items: Sequence[float]) -> bool:
        """Look at a probe after `step` completed updates; whether the LR changes from the next update on."""
        ...

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON values."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        ...


@dataclass(frozen=True, slots=True)
class LRSchedule:
    """A named schedule laid over one run."""

    name: str
    horizon: Horizon
    core: Core
    warmup: Warmup
    cooldown_updates: int = 0
    marks: tuple[Mark, ...] = ()
    feedback: Feedback | None = None
    """Set where the schedule waits for the validation loss."""

    def multiplier(self, k: int, base_lr: float) -> float:
        """The factor on the base LR for update k; beyond the run's end the value at its end."""
        k = min(k, self.horizon.num_updates)
        if k < self.warmup.num_updates:
            return self.warmup.multiplier(k)
        value = self.core(k, base_lr)
        remaining = self.horizon.num_updates - k
        return value * remaining / self.cooldown_updates if remaining < self.cooldown_updates else value

    def lr(self, k: int, base_lr: float) -> float:
        """The learning rate of update k."""
        return base_lr * self.multiplier(k, base_lr)
