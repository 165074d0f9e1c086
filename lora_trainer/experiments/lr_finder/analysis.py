"""What a learning-rate ramp tells: where learning begins, where it turns harmful, and what to use. Never imports torch.

After each update the same noised images are measured; the gain of a point is the mean fall of the relative loss since
the start, paired over these measurements. So a change of a thousandth is seen without any smoothing, which would shift
the curve along the ramp. The suggestion is checked by short runs at learning rates around it, from one start.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
SMOOTHING = 0.98  # fastai's and Lightning's
FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
"""Learning rates of the short runs, by the suggestion."""
OVERLAP_SE = 2.0
Verdict = Literal["found", "no signal", "too few points"]


@dataclass(frozen=True, slots=True)
class Point:
    """One update of the ramp and the probe after it."""

    lr: float
    gain: float
    """Fall of the probe's relative loss since the start; NaN where the loss was not finite."""
    se: float
    """Standard error of the gain, paired over images and timestep strata."""
    training_loss: float = math.nan
    """Of the update's own batch, before the update: what the classic finders look at."""
    grad_norm: float | None = None
    relative_NS: np.ndarray | None = field(default=None, compare=False)
    """Relative losses of the probe's N images at S strata; None where the update's numbers were not finite."""

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
    """LR to use, two digits, rounded down; the fallback where nothing was result."""
    num_points: int
    """Updates before the crossing, or before the ramp's end."""
    low: float | None = None
    high: float | None = None
    """Range of sensible LRs: from the onset to the crossing corrected for the start at B = 0, or to the best LR where
    nothing crossed."""
    onset: float | None = None
    """First LR from which a tenth of the best gain is kept."""
    crossing: float | None = None
    """First LR after the best at which the probe is above its start; None where the ramp ended before."""
    best: Point | None = None


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
        return RampReading("no signal", fallback_lr, len(points))
    end = crossing_index(points, best)
    onset, crossing = points[onset_index(points, best)].lr, None if end is None else points[end].lr
    num_points = len(points) if end is None else end
    if num_points < MIN_POINTS:
        return RampReading("too few points", fallback_lr, num_points, onset=onset, crossing=crossing, best=points[best])
    upper = points[best].lr if crossing is None else crossing
    high = (
        upper if crossing is None else upper / START_CORRECTION
    )  # without a crossing nothing is known to be too large
    suggestion = round_down(min(math.sqrt(onset * upper), high))
    return RampReading("found", suggestion, num_points, min(onset, high), high, onset, crossing, points[best])


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
    probed = [p for p in points[: None if best is None else crossing_index(points, best)] if p.is_finite]
    trained = [point for point in points if np.isfinite(point.training_loss)]
    kept = slice(len(trained) // 10, len(trained) - 5)  # as fastai trims
    smooth = debiased_average([point.training_loss for point in trained])
    by_loss = {
        "probe": _rules([point.lr for point in probed], [-point.gain for point in probed]),
        "training loss": _rules([point.lr for point in trained[kept]], smooth[kept]),
    }
    return {f"{loss}: {rule}": lr for loss, rules in by_loss.items() for rule, lr in rules.items()}


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
    averages = itertools.accumulate(values, lambda mean, v: SMOOTHING * mean + (1 - SMOOTHING) * v, initial=0.0)
    return [average / (1 - SMOOTHING**count) for count, average in enumerate(averages) if count]


@dataclass(frozen=True, slots=True)
class RunReading:
    """A short run's gain since the common start, and how far it stays behind the best one; None where it diverged."""

    lr: float
    gain: float | None = None
    se: float | None = None
    items: tuple[float, ...] | None = None
    """Relative loss of each image, averaged over strata."""
    behind: float | None = None
    behind_se: float | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """`choice` is None where no run gained more than noise."""

    choice: float | None
    reason: str
    readings: tuple[RunReading, ...]


def lrs_around(suggestion: float, highest: float) -> list[float]:
    """Five learning rates around a suggestion, half a decade apart, none above `highest`."""
    return sorted({suggestion if factor == 1 else min(round_down(suggestion * factor), highest) for factor in FACTORS})


def judge(runs: Mapping[float, np.ndarray | None], start_NS: np.ndarray) -> Verification:
    """The run of largest gain, or the smaller one of the two best where their paired difference is within 2 SE.

    Args:
        runs: relative losses [N, S] of the probe after each short run, by its LR; None where it diverged.
    """
    finite = {lr: after_NS for lr, after_NS in runs.items() if after_NS is not None and np.isfinite(after_NS).all()}
    gains = {lr: paired_gain(relative_NS, start_NS) for lr, relative_NS in finite.items()}
    if not gains:
        return Verification(None, "all of them diverged", tuple(map(RunReading, runs)))
    best, *others = sorted(gains, key=lambda lr: gains[lr][0], reverse=True)
    behind = {lr: paired_gain(finite[best], relative_NS) for lr, relative_NS in finite.items()}
    items = {lr: tuple(relative_NS.mean(axis=1).tolist()) for lr, relative_NS in finite.items()}
    readings = tuple(
        RunReading(lr, *gains[lr], items[lr], *behind[lr]) if lr in finite else RunReading(lr) for lr in runs
    )
    gain, se = gains[best]
    if gain <= SIGNAL_SE * se:
        return Verification(None, "none gained more than three standard errors", readings)
    if others and behind[others[0]][0] <= OVERLAP_SE * behind[others[0]][1]:
        smaller, larger = sorted((best, others[0]))
        return Verification(smaller, f"{smaller:.1e} and {larger:.1e} cannot be told apart: the smaller one", readings)
    return Verification(best, "it gained most", readings)


@dataclass(frozen=True, slots=True)
class FinderResult:
    """All that the finder saw and says."""

    reading: RampReading
    points: tuple[Point, ...]
    start_NS: np.ndarray
    verification: Verification | None
    seconds: float

    @property
    def lr(self) -> float:
        """The learning rate to use: the verified one where there is one."""
        verified = None if self.verification is None else self.verification.choice
        return self.reading.suggestion if verified is None else verified
