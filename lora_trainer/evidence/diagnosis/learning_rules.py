"""Rules about whether the held-out loss falls as the learning rate allows."""

from __future__ import annotations

import numpy as np

from lora_trainer.evidence.diagnosis.finding import (
    Confidence,
    Finding,
    State,
    confidence_of,
    found,
    not_found,
    not_measured,
)
from lora_trainer.evidence.diagnosis.run_facts import RunFacts
from lora_trainer.evidence.diagnosis.series import detrended_scatter, reversals, theil_sen, typical_se
from lora_trainer.evidence.diagnosis.thresholds import Thresholds
from lora_trainer.evidence.diagnosis.trial_log import ProbeLog, TrialLog, paired

NO_PROBES = "no validation section, so nothing was probed"
RATIOS, LEAST_RATIOS = 10, 3
OSCILLATION_CHANGES, MOST_CHANGES = 8, 16
FLAT_PROBES, FLAT_WINDOW = 5, 0.25
REVERSAL_SHARE = 0.1
"""A change of direction counts where both moves are larger than this share of the gain."""
NO_GAIN = 1e6
"""Stands for a scatter that has no gain to be compared with."""
NOISE_VARIANCE = 1.0
"""Loss of a denoiser that predicts nothing, where noise is the target."""


def diverged(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """Worse than the frozen base, on the training batches or on the probe; or collapsed to predicting nothing."""
    ratios = [ratio for _, ratio in log.ratios[-RATIOS:]]
    median = float(np.median(ratios)) if len(ratios) >= LEAST_RATIOS else None
    if median is not None and median > limits.diverged_ratio:
        first, last = log.ratios[-len(ratios)][0], log.ratios[-1][0]
        evidence = f"training loss is {median:.2f} of the base's on the same batches (steps {first}-{last})"
        return found(State.DIVERGED, confidence_of(median / limits.diverged_ratio), evidence, ratio=median)
    held_out = log.held_out
    if len(held_out) < 2:
        if median is None:
            return not_measured(State.DIVERGED, "neither probes nor base-relative losses yet")
        return not_found(State.DIVERGED, f"training loss {median:.2f} of the base's", ratio=median)
    values = held_out.means
    worse = [_is_worse_than_base(log, index, limits) for index in range(len(held_out))]
    pairs = [index for index in range(1, len(worse)) if worse[index] and worse[index - 1]]
    if not pairs:
        return not_found(State.DIVERGED, f"held-out loss {values[-1]:.4f} of the base's", relative=float(values[-1]))
    worst = max(pairs, key=lambda index: values[index])
    collapsed = _is_collapsed(held_out, run) and pairs[-1] == len(held_out) - 1
    still = "and still is" if pairs[-1] == len(held_out) - 1 else f"until step {held_out.steps[pairs[-1]]}"
    what = "collapsed: the denoiser predicts next to nothing" if collapsed else "worse than the frozen base"
    evidence = (
        f"{what}: held-out loss {values[worst]:.3f} of the base's at step {held_out.steps[worst]}, "
        f"above it since step {held_out.steps[pairs[0] - 1]} {still}"
    )
    margin = float(values[worst] - values[0]) / limits.diverged_rise
    return found(State.DIVERGED, confidence_of(margin), evidence, relative=float(values[worst]))


def _is_worse_than_base(log: TrialLog, index: int, limits: Thresholds) -> bool:
    """Clearly worse on held-out images, and no better on those it trains on: that would be overfitting.

    Clear is a rise by some SE, of every image, or of the training images as well.
    """
    rise = log.held_out.change(0, index)
    trained = log.train.change(0, index).mean if len(log.train) > index else 0.0
    if rise.mean <= limits.diverged_rise or trained < 0:
        return False
    each = log.held_out.all_above(index, limits.diverged_rise)
    return rise.z > limits.diverged_se or each or trained > limits.diverged_rise


def _is_collapsed(probe: ProbeLog, run: RunFacts) -> bool:
    """Loss within 2 % of the noise's variance, where the base was well below it."""
    return (
        run.config.model.prediction_type != "v_prediction"
        and probe.losses[0] < 0.9
        and abs(probe.losses[-1] - NOISE_VARIANCE) < 0.02
    )


def oscillating(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """The probes jump up and down by a large part of what was gained; a cooldown that helps confirms it.

    Those of the training images must jump too: where they fall evenly, the LR is not what shakes the others.
    """
    probe = log.held_out
    if not len(probe):
        return not_measured(State.OSCILLATING, NO_PROBES)
    usable = probe.at_or_after(log.lr_history().smooth_since)[-MOST_CHANGES - 1 :]
    if len(usable) <= OSCILLATION_CHANGES:
        missing = f"{len(usable)} probes since the warm-up or the last jump of the LR, {OSCILLATION_CHANGES + 1} needed"
        return not_measured(State.OSCILLATING, missing)
    scatter, gain = detrended_scatter(probe.means[usable]), _typical_gain(probe, usable)
    index = min(_scatter_share(own, usable) for own in (probe, log.train) if len(own) == len(probe))
    in_se = scatter / max(typical_se(probe, usable), 1e-12)
    turns = reversals(probe, usable, REVERSAL_SHARE * max(gain, limits.started_gain))
    helped = _cooldown_fall(log)
    share = "nothing was gained" if index >= NO_GAIN else f"{index:.2f} of the gain or more on each probe"
    evidence = (
        f"held-out loss scatters by {scatter:.4f} between probes ({share}; {in_se:.1f} SE) with "
        f"{turns} clear reversals, steps {probe.steps[usable[0]]}-{probe.steps[usable[-1]]}"
    )
    numbers = {"index": index, "scatter_se": min(in_se, 1e6), "reversals": turns}
    large = (
        index > limits.oscillation_index
        and in_se > limits.oscillation_se
        and turns >= limits.oscillation_reversals
        and (helped is None or helped > limits.cooldown_se)
    )
    if not large:
        return not_found(State.OSCILLATING, evidence, **numbers)
    confidence = confidence_of(index / limits.oscillation_index, in_se / limits.oscillation_se)
    if helped is not None:
        return found(State.OSCILLATING, confidence, f"{evidence}; a cooldown helped by {helped:.1f} SE", **numbers)
    capped: Confidence = "medium" if confidence == "high" else "low"
    return found(State.OSCILLATING, capped, f"{evidence}; no cooldown was measured", **numbers)


def _typical_gain(probe: ProbeLog, usable: list[int]) -> float:
    return 1 - float(np.median(probe.means[usable]))


def _scatter_share(probe: ProbeLog, usable: list[int]) -> float:
    """Scatter between measurements as a share of the gain."""
    gain = _typical_gain(probe, usable)
    return detrended_scatter(probe.means[usable]) / gain if gain > 0 else NO_GAIN


def _cooldown_fall(log: TrialLog) -> float | None:
    """By how many SE the newest cooldown lowered the held-out loss; None where there is none."""
    probe = log.held_out
    for cooldown in reversed(log.cooldowns):
        if cooldown.step in probe.steps:
            before = probe.rows[probe.steps.index(cooldown.step)]
            return -paired(before, cooldown.items_N).z
    return None


def lr_noise_limited(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """A short branch with the LR decayed to 0 lowered the held-out loss: a decay will help."""
    fall = _cooldown_fall(log)
    if fall is None:
        return not_measured(State.LR_NOISE_LIMITED, "no cooldown was logged")
    evidence = f"a cooldown lowered the held-out loss by {fall:.1f} SE"
    if fall > limits.cooldown_se:
        return found(State.LR_NOISE_LIMITED, confidence_of(fall / limits.cooldown_se), evidence, fall_se=fall)
    return not_found(State.LR_NOISE_LIMITED, evidence, fall_se=fall)


def never_started(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """After a fifth of the run neither the held-out nor the training probe has gained anything over the base."""
    probe, history = log.held_out, log.lr_history()
    if len(probe) < 2:
        return not_measured(State.NEVER_STARTED, NO_PROBES if not len(probe) else "one probe so far")
    if log.step < limits.started_share * run.num_updates or history.is_warming_up:
        return not_measured(State.NEVER_STARTED, f"step {log.step} of {run.num_updates} is too early to tell")
    probes = [own for own in (probe, log.train) if len(own) == len(probe)]
    gains = [own.change(0, int(np.argmin(own.means))) for own in probes]
    evidence = (
        f"best held-out gain over the base {probe.gain:z.4f} ({-gains[0].z:z.1f} SE) by step {probe.steps[-1]} "
        f"of {run.num_updates}"
    )
    to_come = run.num_updates / probe.steps[-1]
    small = all(-gain.mean * to_come < limits.doubtful_gain for gain in gains)
    unclear = all(-gain.mean < limits.started_gain or -gain.z < 2 for gain in gains)
    risen = any(own.means[-1] > 1 + limits.doubtful_gain for own in probes)
    numbers = {"gain": probe.gain, "gain_se": gains[0].se}
    if risen or not (small and unclear):
        return not_found(State.NEVER_STARTED, evidence, **numbers)
    margin = limits.started_gain / max(-gains[0].mean, 1e-9)
    return found(State.NEVER_STARTED, confidence_of(margin), evidence, **numbers)


def stagnant(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """Flat although the LR is high and will stay so."""
    now, end = log.lr_history().multiplier, run.final_multiplier
    if len(log.held_out) and min(now, end) <= limits.high_multiplier:
        told = f"LR at {now:.2f} of its peak, and it will end at {end:.2f}"
        return not_found(State.STAGNANT, told, multiplier=now)
    return _flat(log, run, limits, State.STAGNANT)


def finished_decaying(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """Flat because the LR has come down: what a schedule is meant to end in."""
    multiplier = log.lr_history().multiplier
    if len(log.held_out) and multiplier > limits.decayed_multiplier:
        return not_found(State.FINISHED_DECAYING, f"LR at {multiplier:.2f} of its peak", multiplier=multiplier)
    return _flat(log, run, limits, State.FINISHED_DECAYING)


def _flat(log: TrialLog, run: RunFacts, limits: Thresholds, state: State) -> Finding:
    probe, history = log.held_out, log.lr_history()
    if not len(probe):
        return not_measured(state, NO_PROBES)
    window = flat_window(probe, history.smooth_since, run.num_updates)
    if len(window) < FLAT_PROBES:
        missing = f"{len(window)} probes since the warm-up or the last jump of the LR, {FLAT_PROBES} needed"
        return not_measured(state, missing)
    falls = [_fall_over(own, window) for own in (probe, log.train) if len(own) == len(probe)]
    (share, includes_zero), *train = falls
    first, last = probe.steps[window[0]], probe.steps[window[-1]]
    evidence = (
        f"over steps {first}-{last} the held-out loss fell by {share:z.1%} of its gain of {probe.gain:z.4f}, "
        f"at {history.multiplier:.2f} of the peak LR"
    )
    numbers = {"fall_share": share, "multiplier": history.multiplier}
    unsteady = detrended_scatter(probe.means[window]) > limits.oscillation_index * max(probe.gain, 1e-9)
    if share >= limits.flat_share or (state is State.STAGNANT and not includes_zero):
        return not_found(state, evidence, **numbers)
    if unsteady or share < -limits.flat_rise:
        return not_found(state, f"{evidence}, but it is not flat: it rises or jumps", **numbers)
    train_falls = any(share >= limits.flat_share and not includes_zero for share, includes_zero in train)
    if state is State.STAGNANT and train_falls:
        return not_found(state, f"{evidence}, but the training probe still falls (see overfit)", **numbers)
    return found(state, "medium" if len(window) < 2 * FLAT_PROBES else "high", evidence, **numbers)


def flat_window(probe: ProbeLog, since: int, num_updates: int) -> list[int]:
    """The newest five probes, or those of the last quarter of the run where they are more."""
    usable = probe.at_or_after(since)
    recent = [index for index in usable if probe.steps[index] >= probe.steps[-1] - FLAT_WINDOW * num_updates]
    return recent if len(recent) >= FLAT_PROBES else usable[-FLAT_PROBES:]


def _fall_over(probe: ProbeLog, window: list[int]) -> tuple[float, bool]:
    """The fall along the Theil-Sen line as a share of the gain, and whether the slope may be 0 or rising."""
    steps, values = np.asarray(probe.steps)[window], probe.means[window]
    slope, _, high = theil_sen(steps, values)
    return float(-slope * (steps[-1] - steps[0]) / max(probe.gain, 1e-9)), high >= 0
