"""Rules that need nothing but the rows of the updates: non-finite numbers and clipping."""

from __future__ import annotations

import numpy as np

from lora_trainer.evidence.diagnosis.finding import Finding, State, confidence_of, found, not_found, not_measured
from lora_trainer.evidence.diagnosis.run_facts import RunFacts
from lora_trainer.evidence.diagnosis.thresholds import Thresholds
from lora_trainer.evidence.diagnosis.trial_log import TrialLog

OVERFLOW = "fp16 overflow"
LEAST_OVERFLOWS = 3
CLIP_WINDOW, LEAST_UPDATES = 50, 20


def non_finite(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """A loss, gradient or probe that was not finite, or overflows of fp16 that do not end."""
    faults = [skip for skip in log.skips if skip.reason != OVERFLOW]
    probes = log.non_finite_probes
    if faults or probes or log.failure:
        reasons = " and ".join(sorted({f"{skip.reason} at step {skip.step}" for skip in faults[:3]}))
        files = sorted({file for skip in faults for file in skip.files})
        said = [f"not finite: {reasons}, {len(faults)} updates skipped ({', '.join(files[:4])})"] if faults else []
        said += [f"it was ended: {log.failure}"] if log.failure else []
        said += [f"the {name} probe at step {step} is not finite" for step, name in probes[:3]]
        return found(State.NON_FINITE, "high", "; ".join(said), skipped=len(faults))
    overflows = sum(skip.step > 0 for skip in log.skips)  # at step 0 an earlier version settled its loss scale
    if overflows >= LEAST_OVERFLOWS and overflows > limits.non_finite_overflows * log.step:
        words = f"{overflows} of {log.step} updates overflowed in fp16 and were skipped"
        return found(State.NON_FINITE, "medium", words, overflows=overflows)
    evidence = f"{log.step - overflows} updates and all probes finite, {overflows} fp16 overflows"
    return not_found(State.NON_FINITE, evidence)


def clipping(log: TrialLog, run: RunFacts, limits: Thresholds) -> Finding:
    """Most of the newest updates were clipped, so that the clip sets the step and not the LR."""
    limit = run.config.train.max_grad_norm
    if limit is None:
        return not_measured(State.CLIPPING, "train.max_grad_norm is null, nothing is clipped")
    if len(log.clipped) < LEAST_UPDATES:
        return not_measured(State.CLIPPING, f"only {len(log.clipped)} updates were applied")
    window = min(log.step, max(CLIP_WINDOW, run.num_updates // 10))
    share = float(np.mean(log.clipped[-window:]))
    median = float(np.median(log.grad_norms[-window:]))
    evidence = (
        f"{share:.0%} of updates {log.step - window + 1}-{log.step} were clipped to {limit:g}; "
        f"median gradient norm {median:.3g}"
    )
    numbers = {"share": share, "median_grad_norm": median}
    if share > limits.clipped_share:
        return found(State.CLIPPING, confidence_of(share / limits.clipped_share, median / limit), evidence, **numbers)
    return not_found(State.CLIPPING, evidence, **numbers)
