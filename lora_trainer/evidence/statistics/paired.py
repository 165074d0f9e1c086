"""The statistics under a verdict: Student's t on paired differences, and Holm's correction over many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit


@dataclass(frozen=True, slots=True)
class PairedTest:
    """n paired differences looked at with Student's t: a mean, its standard error, a two-sided p-value."""

    num_pairs: int
    mean: float
    se: float
    p: float

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """The two-sided confidence interval of the mean that misses it in a share `level` of repetitions."""
        half = float(stdtrit(self.num_pairs - 1, 1 - level / 2)) * self.se
        return self.mean - half, self.mean + half


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Test the mean of at least two differences against zero, as scipy.stats.ttest_rel does.

    Differences without any spread have p = 0, or 1 where they are all zero.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, se = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    if se == 0:
        return PairedTest(len(values), mean, se, p=1.0 if mean == 0 else 0.0)
    return PairedTest(len(values), mean, se, p=float(2 * stdtr(len(values) - 1, -abs(mean) / se)))


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
    result = np.empty(len(p))
    result[order] = raised
    return result


def same_sign_share(differences: Sequence[float]) -> float:
    """The share of differences that point where their mean points."""
    values = np.asarray(differences, dtype=np.float64)
    return float(np.mean(np.sign(values) == np.sign(values.mean())))
