"""The edges of single rules, on logs of a few measurements made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.evaluation.synthetic_runs import run_facts
from lora_trainer.evidence.diagnosis.diagnose import RULES
from lora_trainer.evidence.diagnosis.findings import Finding, State
from lora_trainer.evidence.diagnosis.log import ProbeLog, TrialLog
from lora_trainer.evidence.diagnosis.rules import Thresholds, reversals

EVERY = 10
Losses = Sequence[Sequence[float]]


def log_of(**probes: Losses) -> TrialLog:
    """A constant LR of 1e-3; each probe's images, loss relative to the base, before training and every ten updates."""
    log = TrialLog()
    for index in range(max(map(len, probes.values()))):
        for k in range(EVERY * (index - 1), EVERY * index):
            log.add({"step": k + 1, "trial": "t", "lr": 1e-3, "grad_norm": 0.1, "clipped": False})
        for name, rows in probes.items():
            loss = 0.2 * float(np.mean(rows[index]))
            log.add(
                {"event": "validation", "step": EVERY * index, "probe": name, "loss": loss, "items": list(rows[index])}
            )
    return log


def answer(state: State, log: TrialLog, num_updates: int | None = None, final_multiplier: float = 1.0) -> Finding:
    run = replace(run_facts(num_updates or log.step), final_multiplier=final_multiplier)
    return RULES[state](log, run, Thresholds())


def evenly(levels: Sequence[float]) -> Losses:
    """Three images that move together, but not quite by the same share."""
    return [[1 + (level - 1) * share for share in (0.9, 1.0, 1.1)] for level in levels]


def test_a_small_gain_that_will_be_a_large_one_by_the_end_has_started() -> None:
    unclear = [[1, 1], [0.998, 1.001], [0.992, 1.002]]  # 0.3 % on the mean, not two SE
    log = log_of(held_out=unclear, train=unclear)
    assert answer(State.NEVER_STARTED, log).status == "found"
    assert answer(State.NEVER_STARTED, log, num_updates=100).status == "not found"


@pytest.mark.parametrize("rounding", [-1e-9, 0.0, 1e-9])
def test_no_gain_is_told_without_the_sign_of_its_rounding(rounding: float) -> None:
    still = [[1, 1 + rounding]] * 5  # the log has nine digits
    found = answer(State.NEVER_STARTED, log_of(held_out=still, train=still))
    assert found.evidence.startswith("best held-out gain over the base 0.0000 (0.0 SE) by step 40")


def test_a_loss_that_rises_is_not_called_never_started() -> None:
    still = [[1, 1]] * 5
    assert answer(State.NEVER_STARTED, log_of(held_out=still, train=still)).status == "found"
    for moving in ("held_out", "train"):
        probes = {"held_out": still, "train": still, moving: [*still[:4], [1.03, 1.02]]}
        assert answer(State.NEVER_STARTED, log_of(**probes)).status == "not found"


def test_what_rises_or_jumps_is_not_stagnant() -> None:
    flat = [1, 0.8, 0.7, 0.701, 0.7, 0.699, 0.7]
    risen = [1, 0.8, 0.7, 0.74, 0.76, 0.78, 0.8]
    jumping = [1, 0.8, 0.7, 0.8, 0.68, 0.82, 0.7]
    for levels, status in ((flat, "found"), (risen, "not found"), (jumping, "not found")):
        found = answer(State.STAGNANT, log_of(held_out=evenly(levels), train=evenly(levels)))
        assert found.status == status, found.evidence
    assert "rises or jumps" in found.evidence


def test_what_is_flat_before_its_decay_is_not_stagnant() -> None:
    levels = evenly([1, 0.8, 0.7, 0.701, 0.7, 0.699, 0.7])
    log = log_of(held_out=levels, train=levels)
    assert answer(State.STAGNANT, log, num_updates=200).status == "found"
    decaying = answer(State.STAGNANT, log, num_updates=200, final_multiplier=0.01)
    assert decaying.status == "not found"
    assert "it will end at 0.01" in decaying.evidence


def test_two_prior_images_that_both_got_clearly_worse_are_forgetting_without_a_standard_error() -> None:
    held_out = evenly([1, 0.9, 0.8])
    unequal = log_of(held_out=held_out, prior=[[1, 1], [1.06, 1.4], [1.07, 1.5]])
    assert unequal.prior.change(0, -1).z < Thresholds().forgetting_se
    assert answer(State.FORGETTING, unequal).status == "found"
    one_of_two = log_of(held_out=held_out, prior=[[1, 1], [1.0, 1.4], [1.01, 1.5]])
    assert answer(State.FORGETTING, one_of_two).status == "not found"


def test_overfitting_asks_that_the_training_images_still_gain() -> None:
    held_out = evenly([1, 0.8, 0.85, 0.9, 0.95])
    learning, unlearning = evenly([1, 0.8, 0.7, 0.65, 0.6]), evenly([1, 0.8, 0.7, 0.82, 0.84])
    assert answer(State.OVERFIT, log_of(held_out=held_out, train=learning)).status == "found"
    assert answer(State.OVERFIT, log_of(held_out=held_out, train=unlearning)).status == "not found"


def test_two_images_that_both_lose_again_are_overfitting_without_a_standard_error() -> None:
    train = evenly([1, 0.8, 0.7, 0.65, 0.6])
    both = [[1, 1], [0.8, 0.8], [0.81, 0.95], [0.82, 1.1], [0.81, 1.2]]
    assert answer(State.OVERFIT, log_of(held_out=both, train=train)).status == "found"
    one = [[1, 1], [0.8, 0.8], [0.79, 0.95], [0.78, 1.1], [0.79, 1.2]]
    assert answer(State.OVERFIT, log_of(held_out=one, train=train)).status == "not found"


def test_above_the_base_on_both_probes_is_divergence_however_unequal_the_images() -> None:
    unequal = [[1, 1], [0.9, 0.9], [1.05, 1.4], [1.08, 1.6]]
    assert answer(State.DIVERGED, log_of(held_out=unequal, train=unequal)).status == "found"
    assert answer(State.DIVERGED, log_of(held_out=unequal, train=[[1, 1]] * 4)).status == "not found"


def test_what_shakes_the_held_out_images_alone_is_not_the_learning_rate() -> None:
    swinging = evenly([1, 0.7, 0.9, 0.65, 0.9, 0.7, 0.95, 0.65, 0.85, 0.6])
    even = evenly(np.linspace(1, 0.4, 10).tolist())
    assert answer(State.OSCILLATING, log_of(held_out=swinging, train=swinging)).status == "found"
    assert answer(State.OSCILLATING, log_of(held_out=swinging, train=even)).status == "not found"


def test_a_restart_that_harms_the_training_images_too_is_a_shock_however_unequal_the_images() -> None:
    def after_a_restart(train: Losses) -> Finding:
        log = log_of(held_out=[[1, 1], [0.8, 0.8], [0.7, 0.7], [0.71, 0.8], [0.72, 0.81]], train=train)
        log.lrs = [1e-3 * (1 - k % 20 / 20) for k in range(40)]
        return answer(State.RESTART_SHOCK, log)

    assert after_a_restart(evenly([1, 0.8, 0.7, 0.75, 0.74])).status == "found"
    assert after_a_restart(evenly([1, 0.8, 0.7, 0.68, 0.66])).status == "not found"


def test_all_that_was_gained_can_be_lost() -> None:
    overfit = log_of(held_out=evenly([1, 0.8, 0.9, 1.1, 1.2]), train=evenly([1, 0.8, 0.7, 0.6, 0.5]))
    assert "all that was gained is lost" in answer(State.OVERFIT, overfit).evidence


@pytest.mark.parametrize(("least", "turns"), [(0.05, 3), (0.15, 1), (0.25, 0)])
def test_reversals_count_moves_that_are_large_for_the_gain(least: float, turns: int) -> None:
    probe = ProbeLog()
    for step, level in enumerate((1.0, 0.8, 1.0, 0.9, 1.0)):
        probe.add({"step": step, "items": [level - 0.01, level + 0.01], "loss": level})
    assert reversals(probe, list(range(5)), least) == turns


def overflowed(skipped: int, updates: int, reason: str = "fp16 overflow") -> TrialLog:
    """A log whose first updates were skipped."""
    log = TrialLog()
    for step in range(1, updates + 1):
        if step <= skipped:
            log.add({"event": "skip", "step": step, "reason": reason, "files": ["a"]})
        else:
            log.add({"step": step, "lr": 1e-3, "grad_norm": 0.5, "clipped": False})
    return log


@pytest.mark.parametrize(
    ("skipped", "updates", "status"), [(2, 60, "not found"), (3, 300, "not found"), (4, 300, "found")]
)
def test_overflows_are_a_fault_above_one_percent_of_the_updates_and_from_three_on(
    skipped: int, updates: int, status: str
) -> None:
    assert answer(State.NON_FINITE, overflowed(skipped, updates), updates).status == status


def test_clipping_is_judged_by_updates_that_were_applied() -> None:
    assert answer(State.CLIPPING, overflowed(30, 30), 30).evidence == "only 0 updates were applied"
    assert answer(State.CLIPPING, overflowed(1, 60), 60).status == "not found"
