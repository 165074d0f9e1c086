"""The verdict against scipy, against a worked example, and against planted truths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.evaluation import verdict_rates
from lora_trainer.evidence.statistics.paired import holm_factors, paired, same_sign_share
from lora_trainer.evidence.statistics.verdict import (
    Arm,
    Outcome,
    Question,
    Rules,
    compare,
    judge,
    leaders,
    questions,
    smallest_effect,
    tuned,
)
from lora_trainer.report.tables import arms_table, pairs_table

SEEDS = range(5)
SEED_PART = np.array([0.004, -0.002, 0.001, -0.003, 0.002])
NOISE = 1e-4 * np.array([[1, -2, 0, 2, -1], [-1, 1, 2, -2, 0], [0, 2, -1, 1, -2], [2, 0, -2, -1, 1]])


def arm(
    name: str,
    mean: float,
    noise: int = 0,
    *,
    lr: float = 1e-4,
    budget: float = 1.0,
    setting: str | None = None,
    num_seeds: int = 5,
    failed: Mapping[int, str] | None = None,
) -> Arm:
    values = mean + SEED_PART + NOISE[noise]
    losses = {seed: float(values[seed]) for seed in range(num_seeds) if seed not in (failed or {})}
    return Arm(name, setting or name, lr, budget, losses, failed or {})


def test_the_paired_test_is_scipys() -> None:
    stream = np.random.default_rng(3)
    for num in (2, 3, 5, 20):
        one, other = stream.normal(1, 1, num), stream.normal(1.4, 2, num)
        ours, theirs = paired(list(other - one)), stats.ttest_rel(other, one)
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-12)
        assert ours.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-12)
        assert ours.interval(0.01) == pytest.approx(tuple(theirs.confidence_interval(0.99)), rel=1e-12)
    assert paired([0.0, 0.0, 0.0]).p == 1.0
    assert paired([0.25, 0.25, 0.25]).p == 0.0


def test_holm_on_a_worked_example() -> None:
    """p = .01 .04 .03 .005 of four: .005 x 4, .01 x 3, .03 x 2, .04 x 1 raised to the .06 before it."""
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert holm_factors(p, 4) * p == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_factors(p, 6) * p == pytest.approx([0.05, 0.12, 0.12, 0.03])
    assert list(holm_factors([0.0, 0.5], 2)) == [2, 1]


def test_the_adjusted_interval_excludes_zero_exactly_where_the_adjusted_p_is_small() -> None:
    stream, seen = np.random.default_rng(0), set()
    for _ in range(60):
        for pair in compare(verdict_rates.arms(stream, (0, 0.0015, 0.003, 0.003), 5)):
            assert pair.adjusted_interval is not None and pair.adjusted_p is not None
            excludes = pair.adjusted_interval[0] > 0
            assert excludes == (pair.adjusted_p < 0.05)
            seen.add(excludes)
    assert seen == {True, False}


def test_the_interval_covers_the_planted_effect() -> None:
    assert 0.93 <= verdict_rates.coverage(500, num_seeds=5, seed=1) <= 0.97


def test_six_equal_arms_have_a_winner_in_at_most_five_percent() -> None:
    assert verdict_rates.false_wins(500, num_arms=6, num_seeds=5, seed=1) <= 0.05


def test_six_equal_settings_with_tuned_lrs_too() -> None:
    assert verdict_rates.false_wins_of_tuning(200, 3, 6, 0, num_seeds=5, seed=1) <= 0.05


def test_a_large_effect_is_found() -> None:
    assert verdict_rates.power(100, num_arms=6, num_seeds=5, effect_sd=4) > 0.9


NAMED = {"mine": "max_grad_norm2", "cosine-lr1e-3": "cosine"}
"""Setting by name."""


def only(one: Arm, other: Arm, rules: Rules | None = None) -> tuple[Outcome, str]:
    (pair,) = compare([one, other], rules)
    return pair.outcome, pair.why


def test_every_condition_of_better_can_stand_in_the_way() -> None:
    assert only(arm("a", 0.95), arm("b", 0.97, 1)) == (Outcome.BETTER, "")
    small = only(arm("a", 0.95), arm("b", 0.9504, 0))  # certain, but under 1 % of the gain of 5 %
    assert small == (Outcome.NO_DIFFERENCE, "the difference is within 1% of the gain over the base")
    assert only(arm("a", 0.95), arm("b", 0.9504, 0), Rules(min_effect=0.005))[0] == Outcome.BETTER
    noisy, why = only(arm("a", 0.95), Arm("b", "b", 1e-4, 1, {s: 0.95 + 0.01 * s**2 for s in SEEDS}))
    assert noisy == Outcome.NO_DIFFERENCE
    assert why.startswith("adjusted p")
    mixed = dict(enumerate([0.954, 0.949, 0.955, 0.949, 0.955]))
    outcome, why = only(Arm("a", "a", 1, 1, dict.fromkeys(SEEDS, 0.95)), Arm("b", "b", 1, 1, mixed), Rules(level=0.2))
    assert (outcome, why) == (Outcome.NO_DIFFERENCE, "only 60% of the seeds point this way")
    assert same_sign_share([1, 1, 1, 1, -0.5]) == 0.8
    assert only(arm("a", 0.95, num_seeds=2), arm("b", 0.99)) == (
        Outcome.NOT_TESTED,
        "2 seeds in common, 3 are needed",
    )
    assert only(arm("a", 0.95), arm("b", 0.99, failed={3: "not finite"})) == (
        Outcome.NOT_TESTED,
        "b failed on seed 3",
    )


def test_the_smallest_effect_is_a_share_of_the_larger_gain() -> None:
    (pair,) = compare([arm("a", 0.9), arm("b", 0.96)])
    assert smallest_effect(pair, Rules()) == pytest.approx(0.01 * 0.1, rel=0.01)


def test_pairs_that_cannot_be_tested_still_count_in_the_correction() -> None:
    three = [arm("a", 0.95), arm("b", 0.951, 1), arm("c", 0.97, failed={0: "not finite"})]
    with_failed = next(pair for pair in compare(three) if pair.worse.name == "b")
    alone = compare(three[:2])[0]
    assert with_failed.test is not None and alone.test is not None
    assert with_failed.adjusted_p == pytest.approx(3 * alone.test.p)
    assert alone.adjusted_p == alone.test.p


LABEL = "same peak LR 1e-4"


def said(*arms: Arm, confirmed: bool = False, label: str = LABEL) -> str:
    return judge(Question(label, arms), purpose="confirmation" if confirmed else "selection").sentence


def test_the_sentence_of_a_win() -> None:
    assert said(arm("constant", 0.97), arm("cosine", 0.95, 1)) == (
        "On 5 paired seeds (held-out loss, same peak LR 1e-4, one pair): cosine is better than constant; the same "
        "seeds chose and judged, so the size of a difference is to be confirmed on fresh ones."
    )
    assert said(arm("constant", 0.97), arm("cosine", 0.95, 1), confirmed=True) == (
        "On 5 fresh paired seeds (held-out loss, same peak LR 1e-4, one pair): cosine is better than constant."
    )


def test_the_sentence_of_a_tie_prefers_the_smaller_lr() -> None:
    start = "On 5 paired seeds (held-out loss, same peak LR 1e-4, one pair): no difference shown between "
    linear, constant = arm("linear", 0.95, budget=0.5), arm("constant", 0.95, 1)
    tie = "; the tie goes to the smaller LR over the run, linear (budget 0.50)."
    assert said(constant, linear) == start + "constant and linear" + tie
    low = arm("low", 0.95, lr=3e-5)
    assert said(constant, low).endswith("the tie goes to the smaller LR, low (3e-05).")
    assert said(constant, arm("other", 0.95)).endswith("their LRs are equal too, so take either.")


def test_last_bits_decide_no_order_choice_or_word() -> None:
    """Losses and budgets that are equal but for rounding, whichever way it fell: everything reads the same."""

    def rounded(sign: int) -> list[Arm]:
        stream = np.random.default_rng(0)
        tied = [arm("b", 1.0, 2), arm("a", 1.0, 2), arm("worse", 1.1, 1)]
        return [
            replace(
                each,
                losses={seed: loss + sign * 1e-8 * stream.normal() for seed, loss in each.losses.items()},
                lr_budget=0.5 + sign * 1e-16 * place,
            )
            for place, each in enumerate(tied)
        ]

    told = set()
    for sign in (-1, 0, 1):
        arms = rounded(sign)
        verdict = judge(Question(LABEL, tuple(arms)))
        assert [each.name for each in verdict.arms] == ["b", "a", "worse"]
        assert verdict.pairs[0].differences == (0.0,) * 5
        told.add((verdict.sentence, pairs_table(verdict).rows, arms_table(verdict).rows))
    ((sentence, pairs, _),) = told
    assert "no difference shown between b and a; b and a are each better than worse" in sentence
    assert "take either; on average none of these is better than the base" in sentence
    assert pairs[0][:4] == ("b − a", "0.000 %", "0.000 to 0.000", "0.000 to 0.000")
    assert tuned([replace(each, peak_lr=lr) for each, lr in zip(arms, (3e-4, 1e-4, 2e-4), strict=True)]).peak_lr == 1e-4


def test_the_sentence_of_a_part_win() -> None:
    four = (arm("constant", 0.97), arm("cosine", 0.95, 1, budget=0.5), arm("linear", 0.95, 2, budget=0.5))
    assert said(*four, arm("wsd", 0.95, 3, budget=0.9), confirmed=True) == (
        "On 5 fresh paired seeds (held-out loss, same peak LR 1e-4, 6 pairs corrected after Holm): no difference "
        "shown among cosine, linear and wsd; cosine, linear and wsd are each better than constant; the tie goes to the "
        "smaller LR over the run, cosine or linear (budget 0.50)."
    )


def test_the_sentence_of_a_failed_arm_and_of_too_few_seeds() -> None:
    failed = arm("hot", 0.9, 2, failed={2: "not finite at step 40"})
    assert said(arm("constant", 0.97), arm("cosine", 0.95, 1), failed, confirmed=True) == (
        "On 5 fresh paired seeds (held-out loss, same peak LR 1e-4, 3 pairs corrected after Holm): cosine is better "
        "than constant; not tested: hot (hot failed on seed 2)."
    )
    one, two = arm("constant", 0.97, num_seeds=1), arm("cosine", 0.5, num_seeds=1)
    assert said(one, two) == "Not tested: 1 seed in common, and a verdict takes 3 at least."
    assert said(one) == "Nothing was compared: constant is the only setting."


def test_worse_than_the_base_is_said() -> None:
    assert said(arm("a", 1.02), arm("b", 1.05, 1), confirmed=True).endswith(
        "a is better than b; on average none of these is better than the base."
    )


def test_a_loss_that_is_no_number_neither_ties_nor_wins() -> None:
    for value in ("nan", "inf", "-inf"):
        lost = Arm("lost", "lost", 1e-4, 1.0, {**arm("x", 0.5).losses, 3: float(value)})
        assert lost.failed == {3: f"its loss is {value}"}
        verdict = judge(Question(LABEL, (lost, arm("a", 0.95), arm("b", 0.95, 1))))
        assert [a.name for a in verdict.unbeaten] == ["a", "b"]
        assert verdict.arms[-1] == lost
        assert leaders([lost, arm("a", 0.95)], 2) == [arm("a", 0.95)]


def grid(settings: Mapping[str, float], lrs: tuple[float, ...]) -> list[Arm]:
    return [
        arm(f"{name}-{lr:g}", mean + 0.01 * abs(np.log(lr / 1e-4)), lr=lr, setting=name)
        for name, mean in settings.items()
        for lr in lrs
    ]


def test_lrs_are_tuned_per_setting_or_the_table_says_that_they_are_equal() -> None:
    means = {"constant": 0.95, "cosine": 0.94}
    asked = questions(grid(means, (3e-5, 1e-4, 3e-4)))
    assert [q.label for q in asked] == [
        "LR tuned per setting",
        "same peak LR 3e-05",
        "same peak LR 0.0001",
        "same peak LR 0.0003",
    ]
    assert [(a.name, a.peak_lr) for a in asked[0].arms] == [("constant", 1e-4), ("cosine", 1e-4)]
    assert asked[0].notes == ()
    assert [q.label for q in questions(grid(means, (1e-4, 3e-4)))] == ["same peak LR 0.0001", "same peak LR 0.0003"]
    narrow = questions(grid(means, (1e-4, 2e-4, 3e-4)))
    assert "LR tuned per setting" not in [q.label for q in narrow]


def test_a_best_lr_at_the_edge_of_those_tried_is_said() -> None:
    asked = questions(grid({"constant": 0.95, "cosine": 0.94}, (1e-4, 3e-4, 9e-4)))
    assert asked[0].notes[0] == "constant did best at the smallest LR tried (0.0001): its best LR may lie beyond"


@pytest.mark.parametrize(
    "unknown", [{"losses": {}}, {"losses": {}, "failed": {0: "not finite"}}], ids=["not measured", "failed"]
)
def test_no_lr_is_called_the_best_before_it_was_measured(unknown: dict[str, Any]) -> None:
    arms = grid({"constant": 0.95, "cosine": 0.94}, (1e-4, 3e-4, 9e-4))
    none = [replace(each, **unknown) if each.setting == "constant" else each for each in arms]
    assert [note.split()[0] for note in questions(none)[0].notes] == ["cosine"]
    some = [replace(each, losses={}) if each.peak_lr > 1e-4 else each for each in arms]
    assert questions(some)[0].notes == ()


def test_different_lrs_without_tuning_are_labelled() -> None:
    (asked,) = questions([arm("a", 0.95, lr=1e-4), arm("b", 0.96, lr=3e-4)])
    assert asked.label == "peak LRs differ and were not tuned: a difference may be the LR's"
    (asked,) = questions(grid({"cosine": 0.95}, (1e-4, 3e-4)))
    assert asked.label == "one setting at several LRs"


def test_a_failed_arm_ranks_last_and_its_lr_is_not_chosen() -> None:
    arms = grid({"constant": 0.95, "cosine": 0.94}, (3e-5, 1e-4, 3e-4))
    arms[1] = arm("constant-0.0001", 0.5, lr=1e-4, setting="constant", failed={1: "not finite"})
    tuned = {a.name: a.peak_lr for a in questions(arms)[0].arms}
    assert tuned["constant"] != 1e-4
    verdict = judge(Question(LABEL, (arm("bad", 0.2, failed={0: "x"}), arm("good", 0.9))))
    assert [a.name for a in verdict.arms] == ["good", "bad"]


def test_arms_keep_the_names_that_somebody_gave_them() -> None:
    named = [Arm(name, setting, 1e-3, 1.0, dict.fromkeys(SEEDS, 0.9)) for name, setting in NAMED.items()]
    ((_, same),) = [(question.label, question.arms) for question in questions(named)]
    assert [each.name for each in same] == ["mine", "cosine"]
