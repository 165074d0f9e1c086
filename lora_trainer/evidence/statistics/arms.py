"""What is compared: arms with one loss per training seed, and how the learning rates among them were chosen.

A difference between two schedules may come from their peak LR alone. So either each setting's LR is tuned over at least
x1/3, 1, x3, or arms of one and the same peak LR are compared, and the table says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from lora_trainer.evidence.statistics.paired import levels

Purpose = Literal["selection", "confirmation"]
"""What runs are for: to choose among arms, or to judge on fresh seeds those that were chosen."""
MIN_TUNED_LRS = 3
MIN_TUNED_SPAN = 9.0  # the largest LR over the smallest: x1/3, 1, x3
_ROUNDING = 1 - 1e-6


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting at one LR: the held-out loss at the end of each seed's run, relative to the base (1 is the base)."""

    name: str
    setting: str
    """All that was varied but the peak LR and the seed: in a sweep over schedules, the schedule."""
    peak_lr: float
    lr_budget: float
    """Mean of the LR over the run, in units of its peak."""
    losses: Mapping[int, float]
    failed: Mapping[int, str] = field(default_factory=dict)
    """Why a seed's run has no loss."""
    lrs_tried: tuple[float, ...] = ()
    """Peak LRs of its setting that were tried and left out before; its own need not be among them."""

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

    @property
    def lr_sum(self) -> float:
        """Mean LR over the run: how far the weights may have moved."""
        return self.peak_lr * self.lr_budget


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
    if all(_is_tunable(group) for group in settings.values()):
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
    """One setting's arm at its best LR.

    The seeds that choose are those that judge, which flatters a setting with many nearly equal LRs a little: measured
    in docs/verdicts.md, and the reason to confirm on fresh seeds. An LR at which a run failed is chosen only if all
    failed.
    """
    best = ranked(arms)[0]
    return replace(best, name=best.setting)


def ranked(arms: Sequence[Arm]) -> list[Arm]:
    """The smallest mean loss first, arms with a failed seed last; of equals the smaller LR, then the first given."""
    level = levels(arm.mean_loss for arm in arms)
    return sorted(arms, key=lambda arm: (level[arm.mean_loss], arm.peak_lr))


def by_setting(arms: Iterable[Arm]) -> dict[str, list[Arm]]:
    """The arms of each setting, in their order."""
    settings: dict[str, list[Arm]] = {}
    for arm in arms:
        settings.setdefault(arm.setting, []).append(arm)
    return settings


def leaders(arms: Sequence[Arm], num: int) -> list[Arm]:
    """What is worth training again on fresh seeds: the arms with the smallest mean losses.

    Each setting at its best LR, or the LRs where there is one setting. Arms of which a run failed or gave no loss are
    none.
    """
    settings = by_setting(arms)
    candidates = arms if len(settings) == 1 else [ranked(group)[0] for group in settings.values()]
    return [arm for arm in ranked(candidates) if arm.losses and not arm.failed][:num]


def _is_tunable(arms: Sequence[Arm]) -> bool:
    """At least three LRs over a span of nine."""
    lrs = _lrs_tried(arms)
    return len(lrs) >= MIN_TUNED_LRS and lrs[-1] / lrs[0] >= MIN_TUNED_SPAN * _ROUNDING


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
