"""The statistics under every comparison: paired differences, Student's t, Holm's correction; and ties by rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

ROUNDING = 1e-6
"""Losses relative to the base that are no further apart are equal: another machine may order them the other way."""


@dataclass(frozen=True, slots=True)
class PairedMean:
    """The mean of paired differences, looked at with Student's t."""

    num: int
    mean: float
    se: float  # standard error: infinite for one difference, NaN as the mean is where one is not finite

    @property
    def z(self) -> float:
        """The mean in standard errors; 0 where nothing moved."""
        if self.mean == 0:
            return 0.0
        return self.mean / self.se if self.se > 0 else math.copysign(math.inf, self.mean)

    @property
    def p(self) -> float:
        """Of a mean of zero, two-sided, as scipy.stats.ttest_rel has it; 0 without any spread, 1 if all are zero."""
        return float(2 * stdtr(self.num - 1, -abs(self.z)))

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """The two-sided confidence interval of the mean that misses it in a share `level` of repetitions."""
        half = float(stdtrit(self.num - 1, 1 - level / 2)) * self.se
        return self.mean - half, self.mean + half


def paired(differences: ArrayLike) -> PairedMean:
    """Mean and standard error of differences that were paired seed by seed, image by image or cell by cell.

    Args:
        differences: at least one; an array of several axes counts as a list of its cells.
    """
    values = np.asarray(differences, dtype=np.float64).ravel()
    if not np.isfinite(values).all():
        return PairedMean(len(values), math.nan, math.nan)
    se = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return PairedMean(len(values), float(values.mean()), se)


def paired_rise(before: ArrayLike, after: ArrayLike) -> PairedMean:
    """By how much the losses of the same images rose from one measurement to another."""
    return paired(np.subtract(after, before))


def rise_in_se(before: ArrayLike, after: ArrayLike) -> float:
    """The same in standard errors."""
    return paired_rise(before, after).z


def holm_factors(p_values: Sequence[float], num_tests: int) -> np.ndarray:
    """By what each p-value of a family is multiplied in Holm's step-down correction (Holm 1979); before the cut at 1.

    The i-th smallest is multiplied by `num_tests` - i (from i = 0), then raised to the largest product before it.

    Args:
        num_tests: size of the family, which may be more than the p-values that could be computed.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    factors = (num_tests - np.arange(len(p))).astype(np.float64)
    adjusted = np.maximum.accumulate(factors * p[order])
    raised = np.divide(adjusted, p[order], out=factors.copy(), where=p[order] > 0)
    return raised[np.argsort(order)]


def same_sign_share(differences: Sequence[float]) -> float:
    """The share of differences that point where their mean points."""
    values = np.asarray(differences, dtype=np.float64)
    return float(np.mean(np.sign(values) == np.sign(values.mean())))


def levels(losses: Iterable[float]) -> dict[float, float]:
    """For each loss (none of them NaN) the smallest that is equal to it but for rounding: what to sort by."""
    level, level_of = -math.inf, dict[float, float]()
    for loss in sorted(losses):
        level = loss if loss - level > ROUNDING else level
        level_of[loss] = level
    return level_of


def smallest(losses: Sequence[float]) -> int:
    """The place of the smallest loss; of those equal but for rounding the first."""
    least = min(losses) + ROUNDING
    return next(place for place, loss in enumerate(losses) if loss <= least)
