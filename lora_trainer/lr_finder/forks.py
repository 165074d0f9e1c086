"""The check of a suggestion: short runs at several learning rates from one state. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_trainer.lr_finder.analysis import SIGNAL_SE, paired_gain, round_down

FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
OVERLAP_SE = 2.0


@dataclass(frozen=True, slots=True)
class Fork:
    """One short run and the probe after it."""

    lr: float
    relative_NS: np.ndarray | None
    """Relative losses of the probe's N images at S strata; None where the run diverged."""


@dataclass(frozen=True, slots=True)
class ForkReading:
    """A fork's gain since the common start, and how far it stays behind the best one; None where it diverged."""

    lr: float
    gain: float | None = None
    se: float | None = None
    items: tuple[float, ...] | None = None
    """Relative loss of each image, averaged over strata."""
    behind: float | None = None
    behind_se: float | None = None


@dataclass(frozen=True, slots=True)
class ForkVerdict:
    """`choice` is None where no fork gained more than noise."""

    choice: float | None
    reason: str
    readings: tuple[ForkReading, ...]


def fork_lrs(suggestion: float, highest: float) -> list[float]:
    """Five learning rates around a suggestion, half a decade apart, none above `highest`."""
    return sorted({suggestion if factor == 1 else min(round_down(suggestion * factor), highest) for factor in FACTORS})


def judge_forks(forks: Sequence[Fork], start_NS: np.ndarray) -> ForkVerdict:
    """The fork of largest gain, or the smaller one of the two best where their paired difference is within 2 SE."""
    readings = [_read(fork, start_NS) for fork in forks]
    finite = [index for index, reading in enumerate(readings) if reading.gain is not None]
    ranked = sorted(finite, key=lambda index: -(readings[index].gain or 0.0))
    if not ranked:
        return ForkVerdict(None, "all of them diverged", tuple(readings))
    leader = forks[ranked[0]]
    readings = [_behind(reading, fork, leader) for reading, fork in zip(readings, forks, strict=True)]
    top = readings[ranked[0]]
    if (top.gain or 0.0) <= SIGNAL_SE * (top.se or 0.0):
        return ForkVerdict(None, "none gained more than three standard errors", tuple(readings))
    choice, reason = top.lr, "it gained most"
    if len(ranked) > 1:
        second = readings[ranked[1]]
        assert second.behind is not None and second.behind_se is not None
        if second.behind <= OVERLAP_SE * second.behind_se:
            choice, larger = sorted((top.lr, second.lr))
            reason = f"{choice:.1e} and {larger:.1e} cannot be told apart: the smaller one"
    return ForkVerdict(choice, reason, tuple(readings))


def _read(fork: Fork, start_NS: np.ndarray) -> ForkReading:
    if fork.relative_NS is None or not np.isfinite(fork.relative_NS).all():
        return ForkReading(fork.lr)
    return ForkReading(fork.lr, *paired_gain(fork.relative_NS, start_NS), tuple(fork.relative_NS.mean(axis=1).tolist()))


def _behind(reading: ForkReading, fork: Fork, leader: Fork) -> ForkReading:
    """The reading with the leader's lead over it, paired measurement by measurement."""
    if reading.gain is None or fork.relative_NS is None or leader.relative_NS is None:
        return reading
    behind, se = paired_gain(leader.relative_NS, fork.relative_NS)
    return replace(reading, behind=behind, behind_se=se)
