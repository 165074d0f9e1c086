"""Order among losses that a processor's last bits cannot change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

ROUNDING = 1e-6
"""Losses relative to the base that are no further apart are equal: another machine may order them the other way."""


def levels(losses: Iterable[float]) -> dict[float, float]:
    """For each loss (none of them NaN) the smallest that is equal to it but for rounding: what to sort by."""
    level, found = -math.inf, dict[float, float]()
    for loss in sorted(losses):
        level = loss if loss - level > ROUNDING else level
        found[loss] = level
    return found


def smallest(losses: Sequence[float]) -> int:
    """The place of the smallest loss; of those equal but for rounding the first."""
    least = min(losses) + ROUNDING
    return next(place for place, loss in enumerate(losses) if loss <= least)
