"""The learning rates that the finder tries, one per update. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

MIN_POINTS = 30
"""Updates before the crossing under which a ramp is too coarse to read."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """Learning rates in geometric progression, as in the LR range test (Smith 2017)."""

    start_lr: float
    end_lr: float
    num_updates: int

    @property
    def ratio(self) -> float:
        """Factor from each update's LR to the next one's."""
        return (self.end_lr / self.start_lr) ** (1 / (self.num_updates - 1))

    def lr(self, k: int) -> float:
        """The learning rate of update k; the first and the last are exactly `start_lr` and `end_lr`."""
        share = k / (self.num_updates - 1)
        return self.start_lr ** (1 - share) * self.end_lr**share
