"""The check of a suggestion: short runs at learning rates around it, from one start. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_trainer.experiments.lr_finder.analysis import SIGNAL_SE, paired_gain, round_down

FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
OVERLAP_SE = 2.0


@dataclass(frozen=True, slots=True)
class ShortRun:
    """One of them and the probe after it."""

    lr: float
    relative_NS: np.ndarray | None
    """Relative losses of the probe's N images at S strata; None where the run diverged."""


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


def judge(runs: Sequence[ShortRun], start_NS: np.ndarray) -> Verification:
    """The run of largest gain, or the smaller one of the two best where their paired difference is within 2 SE."""
    readings = [_read(run, start_NS) for run in runs]
    finite = [index for index, reading in enumerate(readings) if reading.gain is not None]
    ranked = sorted(finite, key=lambda index: -(readings[index].gain or 0.0))
    if not ranked:
        return Verification(None, "all of them diverged", tuple(readings))
    leader = runs[ranked[0]]
    readings = [_behind(reading, run, leader) for reading, run in zip(readings, runs, strict=True)]
    top = readings[ranked[0]]
    if (top.gain or 0.0) <= SIGNAL_SE * (top.se or 0.0):
        return Verification(None, "none gained more than three standard errors", tuple(readings))
    choice, reason = top.lr, "it gained most"
    if len(ranked) > 1:
        second = readings[ranked[1]]
        assert second.behind is not None and second.behind_se is not None
        if second.behind <= OVERLAP_SE * second.behind_se:
            choice, larger = sorted((top.lr, second.lr))
            reason = f"{choice:.1e} and {larger:.1e} cannot be told apart: the smaller one"
    return Verification(choice, reason, tuple(readings))


def _read(run: ShortRun, start_NS: np.ndarray) -> RunReading:
    if run.relative_NS is None or not np.isfinite(run.relative_NS).all():
        return RunReading(run.lr)
    return RunReading(run.lr, *paired_gain(run.relative_NS, start_NS), tuple(run.relative_NS.mean(axis=1).tolist()))


def _behind(reading: RunReading, run: ShortRun, leader: ShortRun) -> RunReading:
    """The reading with the leader's lead over it, paired measurement by measurement."""
    if reading.gain is None or run.relative_NS is None or leader.relative_NS is None:
        return reading
    behind, se = paired_gain(leader.relative_NS, run.relative_NS)
    return replace(reading, behind=behind, behind_se=se)
