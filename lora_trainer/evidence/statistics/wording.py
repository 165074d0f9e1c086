"""What a comparison allows to be said, in one sentence and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_trainer.evidence.statistics.arms import Arm, Question, ranked
from lora_trainer.evidence.statistics.compare import Outcome, Pair, Rules, compare
from lora_trainer.evidence.statistics.ties import ROUNDING

Purpose = Literal["selection", "confirmation"]
_SAME_BUDGET = 0.01  # linear and cosine differ by less, from rounding of the number of updates


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to one question."""

    question: Question
    purpose: Purpose
    rules: Rules
    arms: tuple[Arm, ...]
    """Best mean first, failed ones last."""
    pairs: tuple[Pair, ...]
    unbeaten: tuple[Arm, ...]
    """Tested arms that no arm is shown to be better than, in the order given."""
    choice: Arm | None
    """What to use on this evidence: the winner, or of a tie the smallest LR; None where nothing was tested."""
    sentence: str


def judge(question: Question, rules: Rules | None = None, purpose: Purpose = "selection") -> Verdict:
    """Compare the arms of a question and say what that allows.

    Args:
        purpose: "confirmation" where the arms were chosen on other seeds than these.
    """
    rules = rules or Rules()
    pairs = compare(question.arms, rules)
    tested = {arm.name for pair in pairs if pair.outcome != Outcome.NOT_TESTED for arm in (pair.better, pair.worse)}
    beaten = {pair.worse.name for pair in pairs if pair.outcome == Outcome.BETTER}
    unbeaten = tuple(arm for arm in question.arms if arm.name in tested and arm.name not in beaten)
    choice = smaller_lr(unbeaten)[0] if unbeaten else None
    sentence = _sentence(question, rules, purpose, pairs, unbeaten)
    return Verdict(question, purpose, rules, tuple(ranked(question.arms)), pairs, unbeaten, choice, sentence)


def _sentence(
    question: Question,
    rules: Rules,
    purpose: Purpose,
    pairs: Sequence[Pair],
    unbeaten: Sequence[Arm],
) -> str:
    """Arms that are named together stand in the order given, so that no noise decides how the sentence reads."""
    given = question.arms
    if len(given) == 1:
        return f"Nothing was compared: {given[0].name} is the only setting."
    if not unbeaten:
        return f"Not tested: {_why_untested(given, pairs, rules)}."
    untested = [arm for arm in given if all(_is_untested(pair) for pair in pairs if arm in (pair.better, pair.worse))]
    parts = []
    if len(unbeaten) > 1:
        parts.append(f"no difference shown {'between' if len(unbeaten) == 2 else 'among'} {_listed(unbeaten)}")
    parts += _shown(given, pairs)
    if untested:
        parts.append(f"not tested: {_listed(untested)} ({_why_untested(given, pairs, rules)})")
    if len(unbeaten) > 1:
        parts.append(smaller_lr(unbeaten)[1])
    if all(arm.mean_loss >= 1 - ROUNDING for arm in unbeaten):
        parts.append("on average none of these is better than the base")
    if purpose == "selection" and any(pair.outcome == Outcome.BETTER for pair in pairs):
        parts.append("the same seeds chose and judged, so the size of a difference is to be confirmed on fresh ones")
    return f"{_evidence(question, pairs, purpose)}: {'; '.join(parts)}."


def _shown(given: Sequence[Arm], pairs: Sequence[Pair]) -> list[str]:
    """The differences shown: "A and B are each better than C", each loser named once, by the best that beat it."""
    winners: dict[frozenset[str], set[str]] = {}
    for arm in ranked(given):
        losers = frozenset(p.worse.name for p in pairs if p.outcome == Outcome.BETTER and p.better.name == arm.name)
        winners.setdefault(losers, set()).add(arm.name)
    named: set[str] = set()
    said = []
    for losers, names in winners.items():
        arms, rest = ([arm for arm in given if arm.name in own] for own in (names, losers - named))
        named.update(losers)
        if rest:
            said.append(f"{_listed(arms)} {'is' if len(arms) == 1 else 'are each'} better than {_listed(rest)}")
    return said


def smaller_lr(tied: Sequence[Arm]) -> tuple[Arm, str]:
    """Which of several tied arms to take, and why: the smaller peak LR, then the smaller LR over the run."""
    lowest = min(arm.peak_lr for arm in tied)
    low = [arm for arm in tied if arm.peak_lr == lowest]
    least = min(arm.lr_sum for arm in low)
    little = [arm for arm in low if arm.lr_sum <= least * (1 + _SAME_BUDGET)]
    if len(low) < len(tied):
        why = f"the tie goes to the smaller LR, {_listed(low, 'or')} ({lowest:.3g})"
    elif len(little) < len(low):
        budget = f"{little[0].lr_budget:.2f}"
        why = f"the tie goes to the smaller LR over the run, {_listed(little, 'or')} (budget {budget})"
    else:
        why = "their LRs are equal too, so take either"
    return little[0], why


def _evidence(question: Question, pairs: Sequence[Pair], purpose: Purpose) -> str:
    counts = sorted({len(pair.seeds) for pair in pairs if pair.outcome != Outcome.NOT_TESTED})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    fresh = " fresh" if purpose == "confirmation" else ""
    corrected = f"{len(pairs)} pairs corrected after Holm" if len(pairs) > 1 else "one pair"
    return f"On {seeds}{fresh} paired seeds (held-out loss, {question.label}, {corrected})"


def _why_untested(given: Sequence[Arm], pairs: Sequence[Pair], rules: Rules) -> str:
    untested = [pair for pair in pairs if _is_untested(pair)]
    told = [f"{arm.name} failed on seed {', '.join(map(str, sorted(arm.failed)))}" for arm in given if arm.failed]
    few = [len(pair.seeds) for pair in untested if not pair.better.failed and not pair.worse.failed]
    if few:
        seeds = f"{max(few)} seed{'s' if max(few) != 1 else ''}"
        told.append(f"{seeds} in common, and a verdict takes {rules.min_seeds} at least")
    return ", ".join(told)


def _is_untested(pair: Pair) -> bool:
    return pair.outcome == Outcome.NOT_TESTED


def _listed(arms: Sequence[Arm], last: str = "and") -> str:
    names = [arm.name for arm in arms]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
