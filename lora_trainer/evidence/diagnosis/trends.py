"""Rules about the course of many measurements: whether it jumps, whether it is flat, and what a cooldown shows."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np

from lora_trainer.evidence.diagnosis.findings import Finding, State, confidence_of
from lora_trainer.evidence.diagnosis.log import ProbeLog, RunFacts, TrialLog
from lora_trainer.evidence.diagnosis.rules import NO_PROBES, Thresholds
from lora_trainer.evidence.statistics.paired import rise_in_se

NORMAL_95 = 1.96
OSCILLATION_CHANGES, MOST_CHANGES = 8, 16
FLAT_PROBES, FLAT_WINDOW = 5, 0.25
REVERSAL_SHARE = 0.1  # of the gain: a change of direction counts where both moves are larger
NO_GAIN = 1e6  # stands for a scatter that has no gain to be compared with


def oscillating(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """The probes jump up and down by a large part of what was gained; a cooldown that helps confirms it.

    Those of the training images must jump too: where they fall evenly, the LR is not what shakes the others.
    """
    probe = log.held_out
    if not len(probe):
        return State.OSCILLATING.not_measured(NO_PROBES)
    usable = probe.at_or_after(log.lr_history().smooth_since)[-MOST_CHANGES - 1 :]
    if len(usable) <= OSCILLATION_CHANGES:
        missing = f"{len(usable)} probes since the warm-up or the last jump of the LR, {OSCILLATION_CHANGES + 1} needed"
        return State.OSCILLATING.not_measured(missing)
    scatter, gain = detrended_scatter(probe.means[usable]), 1 - float(np.median(probe.means[usable]))
    index = min(_scatter_share(learned, usable) for learned in log.learned_probes)
    ses = [probe.change(i, j).se for i, j in pairwise(usable)]
    in_se = scatter / max(float(np.sqrt(np.mean(np.square(ses)))), 1e-12)
    turns = reversals(probe, usable, REVERSAL_SHARE * max(gain, limits.started_gain))
    helped = _cooldown_fall(log)
    share = "nothing was gained" if index >= NO_GAIN else f"{index:.2f} of the gain or more on each probe"
    evidence = (
        f"held-out loss scatters by {scatter:.4f} between probes ({share}; {in_se:.1f} SE) with "
        f"{turns} clear reversals, steps {probe.steps[usable[0]]}-{probe.steps[usable[-1]]}"
    )
    numbers = {"index": index, "scatter_se": min(in_se, 1e6), "reversals": turns}
    large = index > limits.oscillation_index and in_se > limits.oscillation_se
    confirmed = helped is None or helped > limits.cooldown_se
    if not (large and confirmed and turns >= limits.oscillation_reversals):
        return State.OSCILLATING.not_found(evidence, **numbers)
    confidence = confidence_of(index / limits.oscillation_index, in_se / limits.oscillation_se)
    if helped is None:
        confidence = "medium" if confidence == "high" else "low"
    cooldown = "no cooldown was measured" if helped is None else f"a cooldown helped by {helped:.1f} SE"
    return State.OSCILLATING.found(confidence, f"{evidence}; {cooldown}", **numbers)


def _scatter_share(probe: ProbeLog, usable: list[int]) -> float:
    """Scatter between measurements as a share of the gain."""
    gain = 1 - float(np.median(probe.means[usable]))
    return detrended_scatter(probe.means[usable]) / gain if gain > 0 else NO_GAIN


def _cooldown_fall(log: TrialLog) -> float | None:
    """By how many SE the newest cooldown lowered the held-out loss; None where there is none."""
    rows = dict(zip(log.held_out.steps, log.held_out.rows, strict=True))
    measured = [cooldown for cooldown in log.cooldowns if cooldown.step in rows]
    return -rise_in_se(rows[measured[-1].step], measured[-1].items_N) if measured else None


def lr_noise_limited(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """A short branch with the LR decayed to 0 lowered the held-out loss: a decay will help."""
    fall = _cooldown_fall(log)
    if fall is None:
        return State.LR_NOISE_LIMITED.not_measured("no cooldown was logged")
    evidence = f"a cooldown lowered the held-out loss by {fall:.1f} SE"
    confidence = confidence_of(fall / limits.cooldown_se)
    return State.LR_NOISE_LIMITED.found_where(fall > limits.cooldown_se, confidence, evidence, fall_se=fall)


def stagnant(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """Flat although the LR is high and will stay so."""
    now, end = log.lr_history().multiplier, run.final_multiplier
    if len(log.held_out) and min(now, end) <= limits.high_multiplier:
        evidence = f"LR at {now:.2f} of its peak, and it will end at {end:.2f}"
        return State.STAGNANT.not_found(evidence, multiplier=now)
    return _flat(log, run, limits, State.STAGNANT)


def finished_decaying(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """Flat because the LR has come down: what a schedule is meant to end in."""
    multiplier = log.lr_history().multiplier
    if len(log.held_out) and multiplier > limits.decayed_multiplier:
        return State.FINISHED_DECAYING.not_found(f"LR at {multiplier:.2f} of its peak", multiplier=multiplier)
    return _flat(log, run, limits, State.FINISHED_DECAYING)


def _flat(log: TrialLog, run: RunFacts, limits: Thresholds, state: State) -> Finding:
    probe, history = log.held_out, log.lr_history()
    if not len(probe):
        return state.not_measured(NO_PROBES)
    window = _flat_window(probe, history.smooth_since, run.num_updates)
    if len(window) < FLAT_PROBES:
        missing = f"{len(window)} probes since the warm-up or the last jump of the LR, {FLAT_PROBES} needed"
        return state.not_measured(missing)
    (share, includes_zero), *train = [_fall_over(learned, window) for learned in log.learned_probes]
    first, last = probe.steps[window[0]], probe.steps[window[-1]]
    evidence = (
        f"over steps {first}-{last} the held-out loss fell by {share:z.1%} of its gain of {probe.gain:z.4f}, "
        f"at {history.multiplier:.2f} of the peak LR"
    )
    numbers = {"fall_share": share, "multiplier": history.multiplier}
    unsteady = detrended_scatter(probe.means[window]) > limits.oscillation_index * max(probe.gain, 1e-9)
    if share >= limits.flat_share or (state is State.STAGNANT and not includes_zero):
        return state.not_found(evidence, **numbers)
    if unsteady or share < -limits.flat_rise:
        return state.not_found(f"{evidence}, but it is not flat: it rises or jumps", **numbers)
    train_falls = any(share >= limits.flat_share and not includes_zero for share, includes_zero in train)
    if state is State.STAGNANT and train_falls:
        return state.not_found(f"{evidence}, but the training probe still falls (see overfit)", **numbers)
    return state.found("medium" if len(window) < 2 * FLAT_PROBES else "high", evidence, **numbers)


def _flat_window(probe: ProbeLog, since: int, num_updates: int) -> list[int]:
    """The newest five probes, or those of the last quarter of the run where they are more."""
    usable = probe.at_or_after(since)
    recent = [index for index in usable if probe.steps[index] >= probe.steps[-1] - FLAT_WINDOW * num_updates]
    return recent if len(recent) >= FLAT_PROBES else usable[-FLAT_PROBES:]


def _fall_over(probe: ProbeLog, window: list[int]) -> tuple[float, bool]:
    """The fall along the Theil-Sen line as a share of the gain, and whether the slope may be 0 or rising."""
    steps, values = np.asarray(probe.steps)[window], probe.means[window]
    slope, _, high = theil_sen(steps, values)
    return float(-slope * (steps[-1] - steps[0]) / max(probe.gain, 1e-9)), high >= 0


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
