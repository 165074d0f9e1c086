"""What is compared, all with all, under rules that make "no difference shown" a common answer; what may be said of it.

A difference between two schedules may come from their peak LR alone. So either each setting's LR is tuned over at least
x1/3, 1, x3, or arms of one and the same peak LR are compared, and the table says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import combinations
from typing import Literal

import numpy as np

from lora_trainer.evidence.statistics.paired import ROUNDING, PairedMean, holm_factors, levels, paired, same_sign_share

Purpose = Literal["selection", "confirmation"]
"""What runs are for: to choose among arms, or to judge on fresh seeds those that were chosen."""
MIN_TUNED_LRS = 3
MIN_TUNED_SPAN = 9 * (1 - 1e-6)  # the largest LR over the smallest: x1/3, 1, x3, but for rounding
TO_CONFIRM = "the same seeds chose and judged, so the size of a difference is to be confirmed on fresh ones"
_SAME_BUDGET = 0.01  # linear and cosine differ by less, from rounding of the number of updates


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting at one LR: the held-out loss at the end of each seed's run, relative to the base (1 is the base)."""

    name: str
    setting: str  # all that was varied but the peak LR and the seed: in a sweep over schedules, the schedule
    peak_lr: float
    lr_budget: float  # mean of the LR over the run, in units of its peak
    losses: Mapping[int, float]
    failed: Mapping[int, str] = field(default_factory=dict)  # why a seed's run has no loss
    lrs_tried: tuple[float, ...] = ()  # peak LRs of its setting that were left out before; its own need not be one

    def __post_init__(self) -> None:
        """A seed whose loss is not finite has failed."""
        lost = {seed: f"its loss is {loss}" for seed, loss in self.losses.items() if not math.isfinite(loss)}
        object.__setattr__(self, "failed", {**lost, **self.failed})
        object.__setattr__(self, "losses", {seed: loss for seed, loss in self.losses.items() if seed not in lost})

    @property
    def mean_loss(self) -> float:
        """Over its seeds; infinite without any, or where a seed failed, so that such an arm ranks last."""
        return float(np.mean(list(self.losses.values()))) if self.losses and not self.failed else math.inf

    @property
    def failure(self) -> str:
        """Which seeds have no loss, in words."""
        return f"failed on seed {', '.join(map(str, sorted(self.failed)))}"


@dataclass(frozen=True, slots=True)
class Question:
    """A family of arms to compare all with all, and what that comparison is called."""

    label: str
    arms: tuple[Arm, ...]
    notes: tuple[str, ...] = ()


def questions(arms: Sequence[Arm]) -> list[Question]:
    """The comparisons that these arms allow, the most telling first.

    Each setting with its tuned LR, where every setting was tried at three LRs or more; then all settings at each peak
    LR that two of them share. Only where neither is possible, all arms as they are.
    """
    settings = by_setting(arms)
    if len(settings) == 1:
        lrs = {arm.peak_lr for arm in arms}
        return [Question(f"peak LR {lrs.pop():.3g}" if len(lrs) == 1 else "one setting at several LRs", tuple(arms))]
    asked = []
    lrs_tried = [_lrs_tried(group) for group in settings.values()]
    if all(len(lrs) >= MIN_TUNED_LRS and lrs[-1] / lrs[0] >= MIN_TUNED_SPAN for lrs in lrs_tried):
        best = tuple(tuned(group) for group in settings.values())
        asked.append(Question("LR tuned per setting", best, tuple(_at_the_edge(settings))))
    for lr in sorted({arm.peak_lr for arm in arms}):
        same = tuple(replace(arm, name=arm.setting) for arm in arms if arm.peak_lr == lr)
        if len(same) > 1:
            asked.append(Question(f"same peak LR {lr:.3g}", same))
    return asked or [Question("peak LRs differ and were not tuned: a difference may be the LR's", tuple(arms))]


def confirming(arms: Sequence[Arm]) -> Question:
    """The one comparison of arms that were chosen on other seeds."""
    lrs = {arm.peak_lr for arm in arms}
    return Question(f"same peak LR {lrs.pop():.3g}" if len(lrs) == 1 else "LRs chosen on other seeds", tuple(arms))


def tuned(arms: Sequence[Arm]) -> Arm:
    """One setting's arm at its best LR, which is one at which a run failed only if all failed.

    The seeds that choose are those that judge, which flatters a setting with many nearly equal LRs a little: measured
    in docs/verdicts.md, and the reason to confirm on fresh seeds.
    """
    best = ranked(arms)[0]
    return replace(best, name=best.setting)


def ranked(arms: Sequence[Arm]) -> list[Arm]:
    """The smallest mean loss first, arms with a failed seed last; of equals the smaller LR, then the first given."""
    level = levels(arm.mean_loss for arm in arms)
    return sorted(arms, key=lambda arm: (level[arm.mean_loss], arm.peak_lr))


def by_setting(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """The arms of each setting, in their order."""
    settings = dict.fromkeys(arm.setting for arm in arms)
    return {setting: [arm for arm in arms if arm.setting == setting] for setting in settings}


def leaders(arms: Sequence[Arm], num: int) -> list[Arm]:
    """What is worth training again on fresh seeds: the smallest mean losses, without arms that lack a loss.

    Each setting at its best LR, or the LRs where there is one setting.
    """
    settings = by_setting(arms)
    candidates = arms if len(settings) == 1 else [ranked(group)[0] for group in settings.values()]
    return [arm for arm in ranked(candidates) if arm.losses and not arm.failed][:num]


def _lrs_tried(arms: Sequence[Arm]) -> list[float]:
    return sorted({lr for arm in arms for lr in (arm.peak_lr, *arm.lrs_tried)})


def _at_the_edge(settings: Mapping[str, Sequence[Arm]]) -> Iterable[str]:
    """Settings whose best LR is the smallest or the largest tried, once each of their LRs has a result."""
    for name, group in settings.items():
        lrs, best = _lrs_tried(group), ranked(group)[0]
        waiting = any(not arm.losses and not arm.failed for arm in group)
        if not waiting and not best.failed and best.peak_lr in (lrs[0], lrs[-1]):
            end = "smallest" if best.peak_lr == lrs[0] else "largest"
            yield f"{name} did best at the {end} LR tried ({best.peak_lr:.3g}): its best LR may lie beyond"


@dataclass(frozen=True, slots=True)
class Rules:
    """What "better" takes. All of them must hold."""

    level: float = 0.05  # of the confidence intervals and of the familywise error
    min_effect: float = 0.01  # smallest difference that matters, as a share of the larger gain over the base
    min_same_sign: float = 0.8  # share of the seeds that must point the same way
    min_seeds: int = 3


class Outcome(StrEnum):
    """What a pair of arms has shown."""

    BETTER = "better"
    NO_DIFFERENCE = "no difference shown"
    NOT_TESTED = "not tested"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two arms on their common seeds; `better` has the smaller mean loss there, shown or not, or ranks first."""

    better: Arm
    worse: Arm
    seeds: tuple[int, ...]
    differences: tuple[float, ...]  # loss of `worse` minus loss of `better`, seed by seed; 0 where it is rounding
    why: str  # what stood against a test or a difference; empty where one is shown
    test: PairedMean | None = None  # None where the pair was not tested
    adjusted_interval: tuple[float, float] | None = None
    """Widened by Holm's factor: excludes 0 exactly where `adjusted_p` is under the level."""
    adjusted_p: float | None = None

    @property
    def outcome(self) -> Outcome:
        if self.test is None:
            return Outcome.NOT_TESTED
        return Outcome.NO_DIFFERENCE if self.why else Outcome.BETTER


def compare(arms: Sequence[Arm], rules: Rules | None = None) -> tuple[Pair, ...]:
    """Every pair of arms, in the order of the arms' ranks.

    "Better" needs three seeds in common, an interval adjusted after Holm over all K(K-1)/2 pairs that excludes 0, a
    difference above the smallest that matters, and the same sign in 80 % of the seeds. `docs/verdicts.md` has the
    measured error rates.
    """
    rules = rules or Rules()
    pairs = [_untested(one, other, rules) for one, other in combinations(ranked(arms), 2)]
    tests = {index: paired(pair.differences) for index, pair in enumerate(pairs) if not pair.why}
    factors = holm_factors([test.p for test in tests.values()], num_tests=len(pairs))
    for (index, test), factor in zip(tests.items(), factors, strict=True):
        pairs[index] = _tested(pairs[index], test, float(factor), rules)
    return tuple(pairs)


def _untested(one: Arm, other: Arm, rules: Rules) -> Pair:
    """Two arms on their common seeds, not judged yet; with the reason where they cannot be."""
    seeds = tuple(sorted(set(one.losses) & set(other.losses)))
    rises = (other.losses[seed] - one.losses[seed] for seed in seeds)
    differences = tuple(rise if abs(rise) > ROUNDING else 0.0 for rise in rises)
    if sum(differences) < -ROUNDING:
        one, other, differences = other, one, tuple(0.0 - value for value in differences)
    why = [f"{arm.name} {arm.failure}" for arm in (one, other) if arm.failed]
    if len(seeds) < rules.min_seeds:
        why.append(f"{_in_common(len(seeds))}, {rules.min_seeds} are needed")
    return Pair(one, other, seeds, differences, why[0] if why else "")


def _in_common(num_seeds: int) -> str:
    return f"{num_seeds} seed{'s' if num_seeds != 1 else ''} in common"


def smallest_effect(pair: Pair, rules: Rules) -> float:
    """The smallest difference that matters between two arms, in units of the loss relative to the base."""
    gains = [1 - sum(arm.losses[seed] for seed in pair.seeds) / len(pair.seeds) for arm in (pair.better, pair.worse)]
    return rules.min_effect * max(map(abs, gains))


def _tested(pair: Pair, test: PairedMean, factor: float, rules: Rules) -> Pair:
    adjusted_p, share = min(1.0, factor * test.p), same_sign_share(pair.differences)
    against = []
    if adjusted_p >= rules.level:
        against.append(f"adjusted p {adjusted_p:.2g} is not under {rules.level:g}")
    if test.mean <= smallest_effect(pair, rules):
        against.append(f"the difference is within {rules.min_effect:.0%} of the gain over the base")
    if share < rules.min_same_sign:
        against.append(f"only {share:.0%} of the seeds point this way")
    interval = test.interval(rules.level / factor)
    return replace(pair, why="; ".join(against), test=test, adjusted_interval=interval, adjusted_p=adjusted_p)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to one question."""

    question: Question
    purpose: Purpose
    rules: Rules
    arms: tuple[Arm, ...]  # best mean first, failed ones last
    pairs: tuple[Pair, ...]
    unbeaten: tuple[Arm, ...]  # tested arms that no arm is shown to be better than, in the order given

    @property
    def choice(self) -> Arm | None:
        """What to use on this evidence: the winner, or of a tie the smallest LR; None where nothing was tested."""
        return smaller_lr(self.unbeaten)[0] if self.unbeaten else None

    @property
    def sentence(self) -> str:
        """Arms that are named together stand in the order given, so that no noise decides how the sentence reads."""
        given, tied = self.question.arms, len(self.unbeaten) > 1
        if len(given) == 1:
            return f"Nothing was compared: {given[0].name} is the only setting."
        if not self.unbeaten:
            return f"Not tested: {_why_untested(self)}."
        parts = []
        if tied:
            among = "between" if len(self.unbeaten) == 2 else "among"
            parts.append(f"no difference shown {among} {_listed(self.unbeaten)}")
        parts += _shown(given, self.pairs)
        if untested := [arm for arm in given if arm.name not in _tested_names(self.pairs)]:
            parts.append(f"not tested: {_listed(untested)} ({_why_untested(self)})")
        if tied:
            parts.append(smaller_lr(self.unbeaten)[1])
        if all(arm.mean_loss >= 1 - ROUNDING for arm in self.unbeaten):
            parts.append("on average none of these is better than the base")
        if self.purpose == "selection" and any(pair.outcome == Outcome.BETTER for pair in self.pairs):
            parts.append(TO_CONFIRM)
        return f"{_evidence(self)}: {'; '.join(parts)}."


def judge(question: Question, rules: Rules | None = None, purpose: Purpose = "selection") -> Verdict:
    """Compare the arms of a question and say what that allows.

    Args:
        purpose: "confirmation" where the arms were chosen on other seeds than these.
    """
    rules = rules or Rules()
    pairs = compare(question.arms, rules)
    names = _tested_names(pairs) - {pair.worse.name for pair in pairs if pair.outcome == Outcome.BETTER}
    unbeaten = tuple(arm for arm in question.arms if arm.name in names)
    return Verdict(question, purpose, rules, tuple(ranked(question.arms)), pairs, unbeaten)


def _tested_names(pairs: Sequence[Pair]) -> set[str]:
    return {arm.name for pair in pairs if pair.test for arm in (pair.better, pair.worse)}


def _shown(given: Sequence[Arm], pairs: Sequence[Pair]) -> list[str]:
    """The differences shown: "A and B are each better than C", each loser named once, by the best that beat it."""
    winners: dict[frozenset[str], set[str]] = {}
    for arm in ranked(given):
        losers = frozenset(p.worse.name for p in pairs if p.outcome == Outcome.BETTER and p.better.name == arm.name)
        winners.setdefault(losers, set()).add(arm.name)
    named: set[str] = set()
    clauses = []
    for losers, names in winners.items():
        arms, rest = ([arm for arm in given if arm.name in group] for group in (names, losers - named))
        named.update(losers)
        if rest:
            clauses.append(f"{_listed(arms)} {'is' if len(arms) == 1 else 'are each'} better than {_listed(rest)}")
    return clauses


def smaller_lr(tied: Sequence[Arm]) -> tuple[Arm, str]:
    """Which of several tied arms to take, and why: the smaller peak LR, then the smaller LR over the run."""
    lowest = min(arm.peak_lr for arm in tied)
    low = [arm for arm in tied if arm.peak_lr == lowest]
    least = min(arm.lr_budget for arm in low)  # of equal peaks: how far the weights may have moved
    little = [arm for arm in low if arm.lr_budget <= least * (1 + _SAME_BUDGET)]
    why = "their LRs are equal too, so take either"
    if len(low) < len(tied):
        why = f"the tie goes to the smaller LR, {_listed(low, 'or')} ({lowest:.3g})"
    elif len(little) < len(low):
        budget = f"budget {little[0].lr_budget:.2f}"
        why = f"the tie goes to the smaller LR over the run, {_listed(little, 'or')} ({budget})"
    return little[0], why


def _evidence(verdict: Verdict) -> str:
    counts = sorted({len(pair.seeds) for pair in verdict.pairs if pair.test})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    fresh = " fresh" if verdict.purpose == "confirmation" else ""
    corrected = f"{len(verdict.pairs)} pairs corrected after Holm" if len(verdict.pairs) > 1 else "one pair"
    return f"On {seeds}{fresh} paired seeds (held-out loss, {verdict.question.label}, {corrected})"


def _why_untested(verdict: Verdict) -> str:
    reasons = [f"{arm.name} {arm.failure}" for arm in verdict.question.arms if arm.failed]
    seeds = [len(p.seeds) for p in verdict.pairs if not (p.test or p.better.failed or p.worse.failed)]
    if seeds:
        reasons.append(f"{_in_common(max(seeds))}, and a verdict takes {verdict.rules.min_seeds} at least")
    return ", ".join(reasons)


def _listed(arms: Sequence[Arm], last: str = "and") -> str:
    *others, name = [arm.name for arm in arms]
    return f"{', '.join(others)} {last} {name}" if others else name
