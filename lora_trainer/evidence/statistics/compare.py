"""All arms compared with all, paired by seed, under rules that make "no difference shown" a common answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations

from lora_trainer.evidence.statistics.arms import Arm, ranked
from lora_trainer.evidence.statistics.paired import PairedTest, holm_factors, paired_test, same_sign_share
from lora_trainer.evidence.statistics.ties import ROUNDING


@dataclass(frozen=True, slots=True)
class Rules:
    """What "better" takes. All of them must hold."""

    level: float = 0.05
    """Of the confidence intervals and of the familywise error."""
    min_effect: float = 0.01
    """Smallest difference that matters, as a share of the larger of the two gains over the base."""
    min_same_sign: float = 0.8
    """Share of the seeds that must point the same way."""
    min_seeds: int = 3


class Outcome(StrEnum):
    """What a pair of arms has shown."""

    BETTER = "better"
    NO_DIFFERENCE = "no difference shown"
    NOT_TESTED = "not tested"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two arms on their common seeds; `better` is the one with the smaller mean loss there, shown or not.

    Of equals it is the one that ranks first.
    """

    better: Arm
    worse: Arm
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    """Loss of `worse` minus loss of `better`, seed by seed; 0 where it is rounding."""
    outcome: Outcome
    why: str
    """What stood against a difference; empty where one is shown."""
    test: PairedTest | None = None
    interval: tuple[float, float] | None = None
    """Of this pair alone."""
    adjusted_interval: tuple[float, float] | None = None
    """Widened by Holm's factor: excludes 0 exactly where `adjusted_p` is under the level."""
    adjusted_p: float | None = None
    same_sign: float | None = None


def compare(arms: Sequence[Arm], rules: Rules | None = None) -> tuple[Pair, ...]:
    """Every pair of arms, in the order of the arms' ranks.

    "Better" needs three seeds in common, an interval adjusted after Holm over all K(K-1)/2 pairs that excludes 0, a
    difference above the smallest that matters, and the same sign in 80 % of the seeds. `docs/verdicts.md` has the
    measured error rates.
    """
    rules = rules or Rules()
    laid = [_lay(one, other) for one, other in combinations(ranked(arms), 2)]
    reasons = [_untestable(pair, rules) for pair in laid]
    tests = {index: paired_test(pair.differences) for index, pair in enumerate(laid) if reasons[index] is None}
    factors = holm_factors([test.p for test in tests.values()], num_tests=len(laid))
    judged = {
        index: _judge(laid[index], test, float(factor), rules)
        for (index, test), factor in zip(tests.items(), factors, strict=True)
    }
    return tuple(judged.get(index, replace(pair, why=reasons[index] or "")) for index, pair in enumerate(laid))


def _lay(one: Arm, other: Arm) -> Pair:
    """Two arms on their common seeds, not judged yet."""
    seeds = tuple(sorted(set(one.losses) & set(other.losses)))
    rises = [other.losses[seed] - one.losses[seed] for seed in seeds]
    differences = tuple(rise if abs(rise) > ROUNDING else 0.0 for rise in rises)
    if sum(differences) < -ROUNDING:
        one, other, differences = other, one, tuple(0.0 - value for value in differences)
    return Pair(one, other, seeds, differences, Outcome.NOT_TESTED, "")


def _untestable(pair: Pair, rules: Rules) -> str | None:
    for arm in (pair.better, pair.worse):
        if arm.failed:
            return f"{arm.name} failed on seed {', '.join(map(str, sorted(arm.failed)))}"
    if len(pair.seeds) < rules.min_seeds:
        count = f"{len(pair.seeds)} seed{'s' if len(pair.seeds) != 1 else ''} in common"
        return f"{count}, {rules.min_seeds} are needed"
    return None


def smallest_effect(pair: Pair, rules: Rules) -> float:
    """The smallest difference that matters between two arms, in units of the loss relative to the base."""
    gains = [1 - sum(arm.losses[seed] for seed in pair.seeds) / len(pair.seeds) for arm in (pair.better, pair.worse)]
    return rules.min_effect * max(map(abs, gains))


def _judge(pair: Pair, test: PairedTest, factor: float, rules: Rules) -> Pair:
    adjusted_p, share = min(1.0, factor * test.p), same_sign_share(pair.differences)
    against = []
    if adjusted_p >= rules.level:
        against.append(f"adjusted p {adjusted_p:.2g} is not under {rules.level:g}")
    if test.mean <= smallest_effect(pair, rules):
        against.append(f"the difference is within {rules.min_effect:.0%} of the gain over the base")
    if share < rules.min_same_sign:
        against.append(f"only {share:.0%} of the seeds point this way")
    return replace(
        pair,
        outcome=Outcome.NO_DIFFERENCE if against else Outcome.BETTER,
        why="; ".join(against),
        test=test,
        interval=test.interval(rules.level),
        adjusted_interval=test.interval(rules.level / factor),
        adjusted_p=adjusted_p,
        same_sign=share,
    )
