"""What a learning-rate ramp tells: where learning begins, where it turns harmful, and what to use. Never imports torch.

After each update the same noised images are measured; the gain of a point is the mean fall of the relative loss since
the start, paired over these measurements. So a change of a thousandth is seen without any smoothing, which would shift
the curve along the ramp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_trainer.evidence.statistics.paired import paired_rise

MIN_POINTS = 30
"""Updates before the crossing under which a ramp is too coarse to read."""
ONSET_SHARE = 0.1
SIGNAL_SE = 3.0
DIVERGED_LOSS = 0.25
START_CORRECTION = 2.0
"""A ramp from B = 0 overstates the largest safe LR: with an adapter that had trained, the loss crossed its start at
half the LR (measured on a toy UNet)."""
Verdict = Literal["found", "no signal", "too few points"]
SMOOTHING = 0.98  # fastai's and Lightning's


@dataclass(frozen=True, slots=True)
class Point:
    """One update of the ramp and the probe after it."""

    lr: float
    gain: float
    """Fall of the probe's relative loss since the start; NaN where the loss was not finite."""
    se: float
    """Standard error of the gain, paired over images and timestep strata."""
    training_loss: float
    """Of the update's own batch, before the update: what the classic finders look at."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.gain)

    @property
    def is_signal(self) -> bool:
        """Whether the gain stands out of the probe's noise."""
        return self.gain > 0 and self.gain > SIGNAL_SE * self.se

    @property
    def is_diverged(self) -> bool:
        """Whether the probe has risen clearly and by a quarter of the base's loss."""
        return not self.is_finite or (-self.gain > SIGNAL_SE * self.se and -self.gain > DIVERGED_LOSS)


@dataclass(frozen=True, slots=True)
class RampReading:
    """The reading of a ramp."""

    verdict: Verdict
    suggestion: float
    """LR to use, two digits, rounded down; the fallback where nothing was found."""
    low: float | None
    high: float | None
    """Range of sensible LRs: from the onset to the crossing corrected for the start at B = 0, or to the best LR where
    nothing crossed."""
    onset: float | None
    """First LR from which a tenth of the best gain is kept."""
    crossing: float | None
    """First LR after the best at which the probe is above its start; None where the ramp ended before."""
    best: Point | None
    num_points: int
    """Updates before the crossing, or before the ramp's end."""


def paired_gain(now: np.ndarray, start: np.ndarray) -> tuple[float, float]:
    """Mean fall from `start` to `now` and its standard error; both NaN where a loss is not finite.

    Args:
        now, start: relative losses of the same measurements, of any equal shape.
    """
    gain = paired_rise(now, start)
    return gain.mean, gain.se


def has_diverged(points: Sequence[Point]) -> bool:
    """Whether a ramp may stop here: the last two points have diverged, or the last is not finite."""
    return bool(points) and (not points[-1].is_finite or (len(points) > 1 and all(p.is_diverged for p in points[-2:])))


def analyse(points: Sequence[Point], fallback_lr: float) -> RampReading:
    """Read a ramp.

    Args:
        points: in the order of the updates.
        fallback_lr: what to use where the ramp shows no gain.
    """
    best = best_index(points)
    if best is None:
        return RampReading("no signal", fallback_lr, None, None, None, None, None, len(points))
    crossing = crossing_index(points, best)
    onset_lr = points[onset_index(points, best)].lr
    crossing_lr = None if crossing is None else points[crossing].lr
    num_points = len(points) if crossing is None else crossing
    if num_points < MIN_POINTS:
        return RampReading("too few points", fallback_lr, None, None, onset_lr, crossing_lr, points[best], num_points)
    if crossing_lr is None:  # nothing is known to be too large, so no more than what was seen to be best
        high = points[best].lr
        middle = math.sqrt(onset_lr * high)
    else:
        high = crossing_lr / START_CORRECTION
        middle = math.sqrt(onset_lr * crossing_lr)
    suggestion = round_down(min(middle, high))
    return RampReading("found", suggestion, min(onset_lr, high), high, onset_lr, crossing_lr, points[best], num_points)


def best_index(points: Sequence[Point]) -> int | None:
    """The point of largest gain before any divergence; None where it or both its neighbours are within the noise.

    One point alone does not count: among a hundred noisy ones some exceed three standard errors.
    """
    end = next((k for k, point in enumerate(points) if point.is_diverged), len(points))
    if end == 0:
        return None
    best = max(range(end), key=lambda k: points[k].gain)
    neighbours = [points[k] for k in (best - 1, best + 1) if 0 <= k < end]
    return best if points[best].is_signal and any(point.is_signal for point in neighbours) else None


def onset_index(points: Sequence[Point], best: int) -> int:
    """The first point from which a tenth of the best gain is kept up to the best."""
    least = ONSET_SHARE * points[best].gain
    return max((k + 1 for k in range(best) if points[k].gain < least), default=0)


def crossing_index(points: Sequence[Point], best: int) -> int | None:
    """The first point after the best whose probe is above its start, or not finite."""
    return next((k for k in range(best + 1, len(points)) if not points[k].gain >= 0), None)


def round_down(lr: float) -> float:
    """Two significant digits, towards zero: of two values that the evidence cannot tell apart the smaller one."""
    digit = 10.0 ** (math.floor(math.log10(lr)) - 1)
    return float(f"{math.floor(lr / digit * (1 + 1e-12)) * digit:.1e}")


def usual_rules(points: Sequence[Point]) -> dict[str, float | None]:
    """Suggestions by name: on the probe (cut where it crosses its start), and on the smoothed training loss.

    A rule is None where it has too little to look at.
    """
    best = best_index(points)
    kept = list(points) if best is None else list(points[: crossing_index(points, best)])
    kept = [point for point in kept if point.is_finite]
    lrs, losses = [p.lr for p in kept], [-p.gain for p in kept]
    said = {f"probe: {name}": value for name, value in _rules(lrs, losses).items()}
    finite = [point for point in points if np.isfinite(point.training_loss)]
    first, last = len(finite) // 10, len(finite) - 5  # as fastai trims
    smooth = debiased_average([p.training_loss for p in finite])[first:last]
    said |= {f"training loss: {n}": v for n, v in _rules([p.lr for p in finite[first:last]], smooth).items()}
    return said


def _rules(lrs: Sequence[float], losses: Sequence[float]) -> dict[str, float | None]:
    if len(lrs) < 3:
        return dict.fromkeys(("steepest", "minimum / 10", "valley"))
    return {
        "steepest": lrs[int(np.argmin(np.gradient(losses, np.log(lrs))))],
        "minimum / 10": lrs[int(np.argmin(losses))] / 10,
        "valley": lrs[valley_index(losses)],
    }


def valley_index(losses: Sequence[float]) -> int:
    """The middle of the longest falling subsequence, counted back from its end (fastai's `valley`)."""
    lengths = [1] * len(losses)
    for i in range(1, len(losses)):
        lengths[i] = 1 + max((lengths[j] for j in range(i) if losses[j] > losses[i]), default=0)
    end = int(np.argmax(lengths))
    start = max(0, end - lengths[end])
    third = (end - start) / 3
    return start + int(third) + int(third / 2)


def debiased_average(values: Sequence[float]) -> list[float]:
    """Exponential moving average, divided by the weight that it has so far."""
    average, smooth = 0.0, []
    for count, value in enumerate(values, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smooth.append(average / (1 - SMOOTHING**count))
    return smooth
