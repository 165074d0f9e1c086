"""The rules, each about one state: by single updates, by measurements two by two, by the course of many; thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from lora_trainer.evidence.diagnosis.findings import Finding, State, confidence_of
from lora_trainer.evidence.diagnosis.log import ProbeLog, RunFacts, TrialLog
from lora_trainer.evidence.statistics.paired import rise_in_se

NO_PROBES = "no validation section, so nothing was probed"
OVERFLOW, LEAST_OVERFLOWS = "fp16 overflow", 3
CLIP_WINDOW, LEAST_UPDATES = 50, 20
RATIOS, LEAST_RATIOS = 10, 3
NOISE_VARIANCE, LEARNED_LOSS = 1.0, 0.9
"""Loss of a denoiser that predicts nothing, where noise is the target; under what loss a base is well below that."""
REPEATS = 3  # probes in a row that must agree on overfitting
SHOCK_WINDOW, SHOCK_PROBES = 0.05, 2
NORMAL_95 = 1.96
OSCILLATION_CHANGES, MOST_CHANGES = 8, 16
FLAT_PROBES, FLAT_WINDOW = 5, 0.25
REVERSAL_SHARE = 0.1  # of the gain: a change of direction counts where both moves are larger
NO_GAIN = 1e6  # stands for a scatter that has no gain to be compared with


@dataclass(frozen=True, slots=True)
class Thresholds:
    """As calibrated (docs/diagnosis.md); SE is the standard error of a difference paired over the probe's images."""

    diverged_ratio: float = 1.5  # training loss relative to the base, median of the last ratios
    diverged_rise: float = 0.1  # rise of the held-out loss over the base at two probes in a row
    diverged_se: float = 3.0
    oscillation_index: float = 0.25  # scatter of the detrended changes between probes, as a share of the gain
    oscillation_se: float = 1.5
    oscillation_reversals: int = 3  # changes of direction, each beyond its SE and a tenth of the gain
    cooldown_se: float = 2.0
    flat_share: float = 0.1  # a fall by less than this share of the gain over the window is flat
    flat_rise: float = 0.15  # a rise by more than this share is not flat either
    high_multiplier: float = 0.5  # above this share of its peak, now and at the end, an LR is high: flat is stagnant
    decayed_multiplier: float = 0.05  # an LR under this share of its peak has decayed
    started_gain: float = 0.002  # gain over the base under which nothing has been learned, however small its SE
    doubtful_gain: float = 0.01  # gain under which two SE are asked for as well
    started_share: float = 0.2  # share of the run after which a gain can be asked for
    overfit_se: float = 2.0
    overfit_lost: float = 0.1  # share of the gain that was lost again
    forgetting_se: float = 3.0
    forgetting_rise: float = 0.05
    clipped_share: float = 0.5
    shock_se: float = 2.0
    shock_share: float = 0.05  # rise after a restart as a share of the gain
    non_finite_overflows: float = 0.01  # share of updates lost to overflows beyond which the precision does not suit


def non_finite(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """A loss, gradient or probe that was not finite, or overflows of fp16 that do not end."""
    faults = [skip for skip in log.skips if skip["reason"] != OVERFLOW]
    probes = log.non_finite_probes
    if faults or probes or log.failure:
        reasons = " and ".join(sorted({f"{skip['reason']} at step {skip['step']}" for skip in faults[:3]}))
        files = sorted({file for skip in faults for file in skip.get("files", ())})
        clauses = [f"not finite: {reasons}, {len(faults)} updates skipped ({', '.join(files[:4])})"] if faults else []
        clauses += [f"it was ended: {log.failure}"] if log.failure else []
        clauses += [f"the {name} probe at step {step} is not finite" for step, name in probes[:3]]
        return State.NON_FINITE.found("high", "; ".join(clauses), skipped=len(faults))
    overflows = sum(skip["step"] > 0 for skip in log.skips)  # at step 0 an earlier version settled its loss scale
    if overflows >= LEAST_OVERFLOWS and overflows > limits.non_finite_overflows * log.step:
        evidence = f"{overflows} of {log.step} updates overflowed in fp16 and were skipped"
        return State.NON_FINITE.found("medium", evidence, overflows=overflows)
    evidence = f"{log.step - overflows} updates and all probes finite, {overflows} fp16 overflows"
    return State.NON_FINITE.not_found(evidence)


def clipping(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """Most of the newest updates were clipped, so that the clip sets the step and not the LR."""
    limit = run.config.train.max_grad_norm
    if limit is None:
        return State.CLIPPING.not_measured("train.max_grad_norm is null, nothing is clipped")
    if len(log.clipped) < LEAST_UPDATES:
        return State.CLIPPING.not_measured(f"only {len(log.clipped)} updates were applied")
    window = min(log.step, max(CLIP_WINDOW, run.num_steps // 10))
    share, median = float(np.mean(log.clipped[-window:])), float(np.median(log.grad_norms[-window:]))
    updates = f"updates {log.step - window + 1}-{log.step}"
    evidence = f"{share:.0%} of {updates} were clipped to {limit:g}; median gradient norm {median:.3g}"
    confidence, holds = confidence_of(share / limits.clipped_share, median / limit), share > limits.clipped_share
    return State.CLIPPING.found_where(holds, confidence, evidence, share=share, median_grad_norm=median)


def diverged(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """Worse than the frozen base, on the training batches or on the probe; or collapsed to predicting nothing."""
    ratios = [ratio for _, ratio in log.ratios[-RATIOS:]]
    median = float(np.median(ratios)) if len(ratios) >= LEAST_RATIOS else None
    if median is not None and median > limits.diverged_ratio:
        first, last = log.ratios[-len(ratios)][0], log.ratios[-1][0]
        evidence = f"training loss is {median:.2f} of the base's on the same batches (steps {first}-{last})"
        return State.DIVERGED.found(confidence_of(median / limits.diverged_ratio), evidence, ratio=median)
    held_out = log.held_out
    if len(held_out) < 2:
        if median is None:
            return State.DIVERGED.not_measured("neither probes nor base-relative losses yet")
        return State.DIVERGED.not_found(f"training loss {median:.2f} of the base's", ratio=median)
    values, worse = held_out.means, [_is_worse_than_base(log, index, limits) for index in range(len(held_out))]
    pairs = [index for index in range(1, len(worse)) if worse[index] and worse[index - 1]]
    if not pairs:
        return State.DIVERGED.not_found(f"held-out loss {values[-1]:.4f} of the base's", relative=float(values[-1]))
    worst, goes_on = max(pairs, key=lambda index: values[index]), pairs[-1] == len(held_out) - 1
    still = "and still is" if goes_on else f"until step {held_out.steps[pairs[-1]]}"
    predicts_noise = run.config.model.prediction_type != "v_prediction" and held_out.losses[0] < LEARNED_LOSS
    collapsed = goes_on and predicts_noise and abs(held_out.losses[-1] - NOISE_VARIANCE) < 0.02
    what = "collapsed: the denoiser predicts next to nothing" if collapsed else "worse than the frozen base"
    since = f"above it since step {held_out.steps[pairs[0] - 1]} {still}"
    evidence = f"{what}: held-out loss {values[worst]:.3f} of the base's at step {held_out.steps[worst]}, {since}"
    margin = float(values[worst] - values[0]) / limits.diverged_rise
    return State.DIVERGED.found(confidence_of(margin), evidence, relative=float(values[worst]))


def _is_worse_than_base(log: TrialLog, index: int, limits: Thresholds) -> bool:
    """Clearly worse on held-out images, and no better on those it trains on: that would be overfitting.

    Clear is a rise by some SE, of every image, or of the training images as well.
    """
    rise = log.held_out.change(0, index)
    trained = log.train.change(0, index).mean if len(log.train) > index else 0.0
    if rise.mean <= limits.diverged_rise or trained < 0:
        return False
    every_image = log.held_out.every_image_rose(0, index, limits.diverged_rise)
    return rise.z > limits.diverged_se or every_image or trained > limits.diverged_rise


def never_started(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """After a fifth of the run neither the held-out nor the training probe has gained anything over the base."""
    probe, history = log.held_out, log.lr_history()
    if len(probe) < 2:
        return State.NEVER_STARTED.not_measured(NO_PROBES if not len(probe) else "one probe so far")
    if log.step < limits.started_share * run.num_steps or history.is_warming_up:
        return State.NEVER_STARTED.not_measured(f"step {log.step} of {run.num_steps} is too early to tell")
    gains = [learned.change(0, int(np.argmin(learned.means))) for learned in log.learned_probes]
    by = f"by step {probe.steps[-1]} of {run.num_steps}"
    evidence = f"best held-out gain over the base {probe.gain:z.4f} ({-gains[0].z:z.1f} SE) {by}"
    to_come = run.num_steps / probe.steps[-1]
    small = all(-gain.mean * to_come < limits.doubtful_gain for gain in gains)
    unclear = all(-gain.mean < limits.started_gain or -gain.z < 2 for gain in gains)
    risen = any(learned.means[-1] > 1 + limits.doubtful_gain for learned in log.learned_probes)
    holds = small and unclear and not risen
    confidence = confidence_of(limits.started_gain / max(-gains[0].mean, 1e-9))
    return State.NEVER_STARTED.found_where(holds, confidence, evidence, gain=probe.gain, gain_se=gains[0].se)


def overfit(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """The held-out loss has risen above its minimum for three probes while that of the training images fell on."""
    held_out, train = log.held_out, log.train
    if not len(held_out) or len(train) != len(held_out):
        return State.OVERFIT.not_measured("the training images were not probed" if len(held_out) else NO_PROBES)
    values = held_out.means
    best = int(np.argmin(values))
    lost = float(values[-1] - values[best]) / max(held_out.gain, limits.started_gain)
    gap = float(values[-1] - train.means[-1]) - float(values[best] - train.means[best])
    loss = f"{lost:.0%} of the gain lost" if lost < 1 else "all that was gained is lost"
    then = f"best at step {held_out.steps[best]} ({values[best]:.4f} of the base's)"
    evidence = f"held-out loss {then}, now {values[-1]:.4f}: {loss}; gap to the training images {gap:+z.4f} since"
    numbers = {"best_step": held_out.steps[best], "lost_share": min(lost, 1e6), "gap": gap}
    newest = range(len(held_out) - REPEATS, len(held_out))
    clear = (held_out.change(best, i).z > limits.overfit_se or held_out.every_image_rose(best, i) for i in newest)
    risen = best < newest[0] and all(clear)
    still_learning = all(mean < train.means[best] for mean in train.means[-REPEATS:])
    holds = risen and lost > limits.overfit_lost and still_learning and gap > 0
    return State.OVERFIT.found_where(holds, confidence_of(lost / limits.overfit_lost), evidence, **numbers)


def forgetting(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """The loss on prior images, which the LoRA should leave alone, has risen at two probes in a row."""
    prior = log.prior
    if len(prior) < 3:
        few = f"{len(prior) - 1} probes after the start, 2 needed"
        return State.FORGETTING.not_measured(few if len(prior) else "no prior images (validation.prior_dir)")
    rises = [prior.change(0, index) for index in (-2, -1)]
    every_image = all(prior.every_image_rose(0, index, limits.forgetting_rise) for index in (-2, -1))
    newest = f"{prior.means[-1]:.4f} of the base's ({rises[-1].z:+z.1f} SE) at step {prior.steps[-1]}"
    clear = every_image or all(rise.z > limits.forgetting_se for rise in rises)
    holds = clear and all(rise.mean > limits.forgetting_rise for rise in rises)
    confidence = confidence_of(*(rise.mean / limits.forgetting_rise for rise in rises))
    numbers = {"rise": rises[-1].mean, "rise_se": rises[-1].se}
    return State.FORGETTING.found_where(holds, confidence, f"loss on prior images {newest}", **numbers)


def restart_shock(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """After a restart of the LR the held-out loss rose, and it was not made good by the cycle's end."""
    probe, history = log.held_out, log.lr_history()
    if not len(probe):
        return State.RESTART_SHOCK.not_measured(NO_PROBES)
    if not history.restarts:
        return State.RESTART_SHOCK.not_found("the LR never restarted")
    cycles = pairwise([*history.restarts, run.num_steps])
    judged = [span for start, end in cycles if (span := _around(probe, start, end, run)) is not None]
    if not judged:
        missing = "no probe shortly after a restart and one at its cycle's end; set a smaller validation.every_steps"
        return State.RESTART_SHOCK.not_measured(missing)
    shocks = []
    for before, soon, end in judged:
        after = max(soon, key=lambda index: probe.means[index])
        rise, left = probe.change(before, after), probe.change(before, end)
        share = rise.mean / max(1 - float(probe.means[before]), limits.started_gain)
        clear = rise.z > limits.shock_se or _rose_as_well(log.train, before, after, limits)
        stayed = left.mean > 0 and (left.z > 1 or _rose_as_well(log.train, before, end, limits))
        if clear and stayed and share > limits.shock_share:
            shocks.append((before, after, end, rise, share))
    if not shocks:
        return State.RESTART_SHOCK.not_found(f"{len(judged)} restarts, each made good by its cycle's end")
    before, after, end, rise, share = max(shocks, key=lambda shock: shock[4])
    start = f"{probe.means[before]:.4f} of the base's at step {probe.steps[before]}"
    peak = f"{probe.means[after]:.4f} at {probe.steps[after]} after the restart"
    last = f"{probe.means[end]:.4f} at the cycle's end, step {probe.steps[end]}"
    confidence = confidence_of(rise.z / limits.shock_se, share / limits.shock_share)
    numbers = {"restart": probe.steps[before], "rise_share": share, "rise_z": min(rise.z, 1e6)}
    evidence = f"held-out loss rose from {start} to {peak}, and is {last}"
    return State.RESTART_SHOCK.found(confidence, evidence, **numbers)


def _rose_as_well(train: ProbeLog, before: int, after: int, limits: Thresholds) -> bool:
    """Whether the training images' loss rose by as large a share: what a restart does, and overfitting does not."""
    if len(train) <= after:
        return False
    gain = max(1 - float(train.means[before]), limits.started_gain)
    return train.change(before, after).mean > limits.shock_share * gain


def _around(probe: ProbeLog, start: int, end: int, run: RunFacts) -> tuple[int, list[int], int] | None:
    """The probe before a restart, the first two after it, and its cycle's last; None where one is missing."""
    before = [index for index, step in enumerate(probe.steps) if step <= start]
    after = [index for index, step in enumerate(probe.steps) if start < step <= end]
    if not before or not after or probe.steps[-1] < end:
        return None
    period = max(b - a for a, b in pairwise(probe.steps))
    soon = probe.steps[after[0]] - start <= max(SHOCK_WINDOW * run.num_steps, period)
    return (before[-1], after[:SHOCK_PROBES], after[-1]) if soon else None


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
    (scatter, gain), *train = [_scatter_and_gain(learned, usable) for learned in log.learned_probes]
    index = min(jumps / gained if gained > 0 else NO_GAIN for jumps, gained in ((scatter, gain), *train))
    ses = [probe.change(i, j).se for i, j in pairwise(usable)]
    in_se = scatter / max(float(np.sqrt(np.mean(np.square(ses)))), 1e-12)
    turns = reversals(probe, usable, REVERSAL_SHARE * max(gain, limits.started_gain))
    helped = _cooldown_fall(log)
    share = "nothing was gained" if index >= NO_GAIN else f"{index:.2f} of the gain or more on each probe"
    reversing = f"{turns} clear reversals, steps {probe.steps[usable[0]]}-{probe.steps[usable[-1]]}"
    evidence = f"held-out loss scatters by {scatter:.4f} between probes ({share}; {in_se:.1f} SE) with {reversing}"
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


def _scatter_and_gain(probe: ProbeLog, usable: list[int]) -> tuple[float, float]:
    return detrended_scatter(probe.means[usable]), 1 - float(np.median(probe.means[usable]))


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
    window = _flat_window(probe, history.smooth_since, run.num_steps)
    if len(window) < FLAT_PROBES:
        missing = f"{len(window)} probes since the warm-up or the last jump of the LR, {FLAT_PROBES} needed"
        return state.not_measured(missing)
    (share, includes_zero), *train = [_fall_over(learned, window) for learned in log.learned_probes]
    steps = f"over steps {probe.steps[window[0]]}-{probe.steps[window[-1]]}"
    fall = f"fell by {share:z.1%} of its gain of {probe.gain:z.4f}"
    evidence = f"{steps} the held-out loss {fall}, at {history.multiplier:.2f} of the peak LR"
    numbers = {"fall_share": share, "multiplier": history.multiplier}
    unsteady = detrended_scatter(probe.means[window]) > limits.oscillation_index * max(probe.gain, 1e-9)
    train_falls = any(share >= limits.flat_share and not includes_zero for share, includes_zero in train)
    if share >= limits.flat_share or (state is State.STAGNANT and not includes_zero):
        return state.not_found(evidence, **numbers)
    if unsteady or share < -limits.flat_rise:
        return state.not_found(f"{evidence}, but it is not flat: it rises or jumps", **numbers)
    if state is State.STAGNANT and train_falls:
        return state.not_found(f"{evidence}, but the training probe still falls (see overfit)", **numbers)
    return state.found("medium" if len(window) < 2 * FLAT_PROBES else "high", evidence, **numbers)


def _flat_window(probe: ProbeLog, since: int, num_steps: int) -> list[int]:
    """The newest five probes, or those of the last quarter of the run where they are more."""
    usable = probe.at_or_after(since)
    recent = [index for index in usable if probe.steps[index] >= probe.steps[-1] - FLAT_WINDOW * num_steps]
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
