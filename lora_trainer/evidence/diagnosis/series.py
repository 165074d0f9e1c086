"""Small statistics on the measurements of one probe."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np

from lora_trainer.evidence.diagnosis.trial_log import ProbeLog

NORMAL_95 = 1.96


def theil_sen(steps: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Median of all pairwise slopes with Sen's 95 % confidence interval (Sen 1968, after Kendall's rank test)."""
    slopes = sorted((values[j] - values[i]) / (steps[j] - steps[i]) for i, j in combinations(range(len(steps)), 2))
    num, pairs = len(steps), len(slopes)
    reach = NORMAL_95 * math.sqrt(num * (num - 1) * (2 * num + 5) / 18)
    low = max(0, math.floor((pairs - reach) / 2))
    return float(np.median(slopes)), slopes[low], slopes[pairs - 1 - low]


def detrended_scatter(values: np.ndarray) -> float:
    """SD of the changes between neighbours after a straight line through those changes is taken off."""
    changes = np.diff(values)
    index = np.arange(len(changes))
    residual = changes - np.polyval(np.polyfit(index, changes, 1), index)
    return float(np.sqrt((residual**2).sum() / max(1, len(changes) - 2)))


def reversals(probe: ProbeLog, indices: list[int], least: float) -> int:
    """Changes of direction between neighbouring changes that are both larger than `least` and than their SE."""
    changes = [probe.change(i, j) for i, j in pairwise(indices)]
    clear = [change.mean if abs(change.mean) > max(least, change.se) else 0.0 for change in changes]
    return sum(a * b < 0 for a, b in pairwise(clear))


def typical_se(probe: ProbeLog, indices: list[int]) -> float:
    """Root mean square of the SEs of the changes between neighbours."""
    ses = [probe.change(i, j).se for i, j in pairwise(indices)]
    return float(np.sqrt(np.mean(np.square(ses))))
