"""The learning rates that were really used, and where they turned: warm-up, restarts, drops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

JUMP_RATIO = 1.5
"""A restart lifts the LR by this factor in one update; a milestone drops it by as much."""
JUMP_SHARE = 0.05
"""... and by this share of the peak, so that the last steps towards 0 count as none."""
JUMP_SUDDEN = 3.0
"""... and by this many times the change before it: a steep curve is no jump."""


def share_of_peak(lr: float, peak: float) -> float:
    """Without the last digits, so that a decay to just a twentieth is one on every processor."""
    return round(float(lr / peak), 9) if peak > 0 else 0.0


@dataclass(frozen=True)
class LRHistory:
    """LR of each completed update, of the first group of weights; `lrs[s - 1]` led to step s."""

    lrs: np.ndarray

    @cached_property
    def warmup_end(self) -> int:
        """Completed updates when the first rise is over; all of them while the LR has only risen so far."""
        stops = np.flatnonzero(np.diff(self.lrs) <= 0)
        return int(stops[0]) if len(stops) else len(self.lrs)

    @property
    def is_warming_up(self) -> bool:
        return self.warmup_end == len(self.lrs)

    @property
    def multiplier(self) -> float:
        """The newest LR as a share of the highest so far."""
        return share_of_peak(self.lrs[-1], self.lrs.max()) if len(self.lrs) else 0.0

    @cached_property
    def restarts(self) -> list[int]:
        """Completed updates at each restart: the next update had a much higher LR."""
        return self._jumps(np.diff(self.lrs), self.lrs[:-1])

    @cached_property
    def drops(self) -> list[int]:
        """Completed updates at each sudden drop: the next update had a much lower LR."""
        return self._jumps(-np.diff(self.lrs), self.lrs[1:])

    def _jumps(self, changes: np.ndarray, low: np.ndarray) -> list[int]:
        """Where the LR changes by much more than it is: `changes` between neighbours, `low` the lower of the two."""
        if not len(changes):
            return []
        before = np.concatenate([[0.0], np.maximum(changes[:-1], 0)])
        large = (changes > (JUMP_RATIO - 1) * low) & (changes > JUMP_SHARE * self.lrs.max())
        large &= changes > JUMP_SUDDEN * before
        return [int(index) + 1 for index in np.flatnonzero(large) if index + 1 > self.warmup_end]

    @property
    def smooth_since(self) -> int:
        """The step from which on probes may be compared: after the warm-up and after the last jump."""
        return max([self.warmup_end, *self.restarts, *self.drops])
