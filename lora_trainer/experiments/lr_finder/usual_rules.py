"""What the finders of other libraries would have said, for comparison. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_trainer.experiments.lr_finder.analysis import Point, best_index, crossing_index

SMOOTHING = 0.98  # fastai's and Lightning's


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
