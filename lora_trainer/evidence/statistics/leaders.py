"""Which arms are worth training again on fresh seeds."""

from __future__ import annotations

from collections.abc import Sequence

from lora_trainer.evidence.statistics.arms import Arm, best_lr, by_setting, ranked


def leaders(arms: Sequence[Arm], num: int) -> list[Arm]:
    """The arms with the smallest mean losses: each setting at its best LR, or the LRs where there is one setting.

    Arms of which a run failed or gave no loss are none.
    """
    settings = by_setting(arms)
    candidates = arms if len(settings) == 1 else [best_lr(own) for own in settings.values()]
    return [arm for arm in ranked(candidates) if arm.losses and not arm.failed][:num]
