"""The numbers behind the rules, as calibrated by `benchmarks/evaluation/calibrate_diagnosis.py` (docs/diagnosis.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thresholds:
    """SE is the standard error of a difference paired over the probe's images."""

    diverged_ratio: float = 1.5
    """Training loss relative to the base, median of the last ratios."""
    diverged_rise: float = 0.1
    """Rise of the held-out loss over the base at two probes in a row."""
    diverged_se: float = 3.0
    oscillation_index: float = 0.25
    """Scatter of the detrended changes between probes, as a share of the gain."""
    oscillation_se: float = 1.5
    oscillation_reversals: int = 3
    """Changes of direction among the last probes, each beyond its SE and a tenth of the gain."""
    cooldown_se: float = 2.0
    flat_share: float = 0.1
    """A fall by less than this share of the gain over the window is flat."""
    flat_rise: float = 0.15
    """A rise by more than this share is not flat either."""
    high_multiplier: float = 0.5
    """An LR above this share of its peak, now and at the end of the run, is high: flatness is then stagnation."""
    decayed_multiplier: float = 0.05
    """An LR under this share of its peak has decayed."""
    started_gain: float = 0.002
    """Gain over the base under which nothing has been learned, however small its SE."""
    doubtful_gain: float = 0.01
    """Gain under which two SE are asked for as well."""
    started_share: float = 0.2
    """Share of the run after which a gain can be asked for."""
    overfit_se: float = 2.0
    overfit_lost: float = 0.1
    """Share of the gain that was lost again."""
    forgetting_se: float = 3.0
    forgetting_rise: float = 0.05
    clipped_share: float = 0.5
    shock_se: float = 2.0
    shock_share: float = 0.05
    """Rise after a restart as a share of the gain."""
    non_finite_overflows: float = 0.01
    """Share of updates skipped for fp16 overflows beyond which the precision does not suit the run."""
