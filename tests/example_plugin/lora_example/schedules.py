"""A learning-rate schedule."""

from collections.abc import Callable


def sawtooth(num_updates: int, updates_per_epoch: int, *, low: float = 0.5) -> Callable[[int], float]:
    """Fall from 1 to `low` in every epoch; the multiplier of update k (0-based)."""
    return lambda k: 1 - (1 - low) * (k % updates_per_epoch) / updates_per_epoch
