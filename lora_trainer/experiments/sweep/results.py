"""What a sweep's record says of its arms: their losses, as the verdicts want them, and which get no further seeds.

`sweep.prune.worse_after_seeds` compares only losses at the end of complete runs, under the rules of a verdict, so that
no schedule is judged before it came to its end. The level of 5 % is divided by the number of looks. Never torch.
"""

from __future__ import annotations

from lora_trainer.evidence.statistics.arms import Arm
from lora_trainer.evidence.statistics.verdict import Outcome, Rules, compare
from lora_trainer.experiments.sweep.record import ENDED, Json, is_left_out

FEWER_SEEDS = "sweep.prune.worse_after_seeds"
LEVEL = Rules().level


def unfinished_trials(content: Json) -> list[str]:
    """Trials that will go on."""
    return [trial["name"] for trial in content["trials"] if trial["status"] not in ENDED]


def arms_of(content: Json) -> list[Arm]:
    """Every arm, in their order, with the held-out losses of its finished seeds and why others have none.

    A seed that was begun and then stopped counts against its arm as one that failed does: else an arm would win on the
    seeds that it survived. One that was not begun counts as nothing.
    """
    rows: dict[str, list[Json]] = {}
    for trial in content["trials"]:
        rows.setdefault(trial["arm"], []).append(trial)
    return [_arm(name, trials) for name, trials in rows.items()]


def _arm(name: str, trials: list[Json]) -> Arm:
    first = trials[0]
    losses = {t["seed"]: float(t["final"]["relative"]) for t in trials if t["final"] is not None}
    ended = [t for t in trials if t["status"] in ("failed", "stopped") and not is_left_out(t)]
    failed = {t["seed"]: str(t["reason"]) for t in ended}
    return Arm(name, first["setting"], first["peak_lr"], first["lr_budget"], losses, failed)


def worse_arms(content: Json, after: int, num_seeds: int) -> dict[str, str]:
    """The arms that were shown to be worse than another and get no further seeds, with the reason.

    Args:
        after: finished seeds from which on an arm is judged.
        num_seeds: of the whole sweep.
    """
    arms = [arm for arm in arms_of(content) if arm.losses and not arm.failed]
    level = LEVEL / max(1, num_seeds - after)
    reasons: dict[str, str] = {}
    for pair in compare(arms, Rules(level=level, min_seeds=after)):
        if pair.outcome == Outcome.BETTER and pair.test is not None:
            reasons.setdefault(
                pair.worse.name,
                f"{FEWER_SEEDS}: {pair.better.name} was better by {pair.test.mean:.4f} on {len(pair.seeds)} seeds "
                f"(adjusted p {pair.adjusted_p:.2g}, {level:.2g} needed)",
            )
    return reasons
