"""Rules that compare probes: overfitting, forgetting, and the shock of a restart."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lora_trainer.evidence.diagnosis.finding import Finding, State, confidence_of, found, not_found, not_measured
from lora_trainer.evidence.diagnosis.learning_rules import NO_PROBES
from lora_trainer.evidence.diagnosis.run_facts import RunFacts
from lora_trainer.evidence.diagnosis.thresholds import Thresholds
from lora_trainer.evidence.diagnosis.trial_log import ProbeLog, TrialLog

REPEATS = 3
"""Probes in a row that must agree on overfitting."""
SHOCK_WINDOW, SHOCK_PROBES = 0.05, 2


def overfit(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """The held-out loss has risen above its minimum for three probes while that of the training images fell on."""
    held_out, train = log.held_out, log.train
    if not len(held_out):
        return not_measured(State.OVERFIT, NO_PROBES)
    if len(train) != len(held_out):
        return not_measured(State.OVERFIT, "the training images were not probed")
    values = held_out.means
    best = int(np.argmin(values))
    lost = float(values[-1] - values[best]) / max(held_out.gain, limits.started_gain)
    gap = float(values[-1] - train.means[-1]) - float(values[best] - train.means[best])
    evidence = (
        f"held-out loss best at step {held_out.steps[best]} ({values[best]:.4f} of the base's), now "
        f"{values[-1]:.4f}: {_lost(lost)}; gap to the training images {gap:+z.4f} since"
    )
    numbers = {"best_step": held_out.steps[best], "lost_share": min(lost, 1e6), "gap": gap}
    newest = range(len(held_out) - REPEATS, len(held_out))
    risen = best < newest[0] and all(_has_risen(held_out, best, index, limits) for index in newest)
    still_learning = all(mean < train.means[best] for mean in train.means[-REPEATS:])
    if not (risen and lost > limits.overfit_lost and still_learning and gap > 0):
        return not_found(State.OVERFIT, evidence, **numbers)
    return found(State.OVERFIT, confidence_of(lost / limits.overfit_lost), evidence, **numbers)


def _has_risen(probe: ProbeLog, best: int, index: int, limits: Thresholds) -> bool:
    """By some SE, or every image's loss: two images that rise by unequal amounts have a large SE."""
    return probe.change(best, index).z > limits.overfit_se or bool((probe.rows[index] > probe.rows[best]).all())


def _lost(share: float) -> str:
    return f"{share:.0%} of the gain lost" if share < 1 else "all that was gained is lost"


def forgetting(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """The loss on prior images, which the LoRA should leave alone, has risen at two probes in a row."""
    prior = log.prior
    if not len(prior):
        return not_measured(State.FORGETTING, "no prior images (validation.prior_dir)")
    if len(prior) < 3:
        return not_measured(State.FORGETTING, f"{len(prior) - 1} probes after the start, 2 needed")
    rises = [prior.change(0, index) for index in (-2, -1)]
    each = all(prior.all_above(index, limits.forgetting_rise) for index in (-2, -1))
    evidence = (
        f"loss on prior images {prior.means[-1]:.4f} of the base's ({rises[-1].z:+z.1f} SE) at step {prior.steps[-1]}"
    )
    numbers = {"rise": rises[-1].mean, "rise_se": rises[-1].se}
    clear = each or all(rise.z > limits.forgetting_se for rise in rises)
    if clear and all(rise.mean > limits.forgetting_rise for rise in rises):
        margins = [rise.mean / limits.forgetting_rise for rise in rises]
        return found(State.FORGETTING, confidence_of(*margins), evidence, **numbers)
    return not_found(State.FORGETTING, evidence, **numbers)


def restart_shock(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """After a restart of the LR the held-out loss rose, and it was not made good by the cycle's end."""
    probe, history = log.held_out, log.lr_history()
    if not len(probe):
        return not_measured(State.RESTART_SHOCK, NO_PROBES)
    if not history.restarts:
        return not_found(State.RESTART_SHOCK, "the LR never restarted")
    ends = [*history.restarts[1:], run.num_updates]
    spans = [_around(probe, start, end, run) for start, end in zip(history.restarts, ends, strict=True)]
    judged = [span for span in spans if span is not None]
    if not judged:
        missing = "no probe shortly after a restart and one at its cycle's end; set a smaller validation.every_steps"
        return not_measured(State.RESTART_SHOCK, missing)
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
        return not_found(State.RESTART_SHOCK, f"{len(judged)} restarts, each made good by its cycle's end")
    before, after, end, rise, share = max(shocks, key=lambda shock: shock[4])
    evidence = (
        f"held-out loss rose from {probe.means[before]:.4f} of the base's at step {probe.steps[before]} to "
        f"{probe.means[after]:.4f} at {probe.steps[after]} after the restart, and is {probe.means[end]:.4f} "
        f"at the cycle's end, step {probe.steps[end]}"
    )
    confidence = confidence_of(rise.z / limits.shock_se, share / limits.shock_share)
    numbers = {"restart": probe.steps[before], "rise_share": share, "rise_z": min(rise.z, 1e6)}
    return found(State.RESTART_SHOCK, confidence, evidence, **numbers)


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
    soon = probe.steps[after[0]] - start <= max(SHOCK_WINDOW * run.num_updates, period)
    return (before[-1], after[:SHOCK_PROBES], after[-1]) if soon else None
