"""`sweep.prune.worse_after_seeds`: arms that were shown to be worse than another get no further seeds. Never torch.

Only losses at the end of complete runs are compared, under the rules of a verdict, so that no schedule is judged
before it came to its end. The level of 5 % is divided by the number of looks.
"""

from __future__ import annotations

from lora_trainer.evidence.statistics.verdict import Outcome, Rules, compare
from lora_trainer.experiments.sweep.groups import trials_of
from lora_trainer.experiments.sweep.record import Json
from lora_trainer.experiments.sweep.results import arms_of
from lora_trainer.training.group import TrialGroup

RULE = "sweep.prune.worse_after_seeds"
LEVEL = Rules().level


def worse_arms(content: Json, after: int, num_seeds: int) -> dict[str, str]:
    """The arms that get no further seeds, with the reason.

    Args:
        after: finished seeds from which on an arm is judged.
        num_seeds: of the whole sweep.
    """
    arms = [arm for arm in arms_of(content) if arm.losses and not arm.failed]
    looks = max(1, num_seeds - after)
    reasons: dict[str, str] = {}
    for pair in compare(arms, Rules(level=LEVEL / looks, min_seeds=after)):
        if pair.outcome == Outcome.BETTER and pair.test is not None:
            reasons.setdefault(
                pair.worse.name,
                f"{RULE}: {pair.better.name} was better by {pair.test.mean:.4f} on {len(pair.seeds)} seeds "
                f"(adjusted p {pair.adjusted_p:.2g}, {LEVEL / looks:.2g} needed)",
            )
    return reasons


def trials_to_drop(group: TrialGroup, content: Json) -> dict[str, str]:
    """The trials of a group that are not worth a further seed, with the reason."""
    after = group.prune.worse_after_seeds
    if after is None:
        return {}
    return trials_of(group, worse_arms(content, after, len({trial["seed"] for trial in content["trials"]})))
