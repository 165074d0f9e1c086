"""What a sweep's record says of its arms, as the verdicts want it. Never imports torch."""

from __future__ import annotations

from lora_trainer.evidence.statistics.verdict import Arm
from lora_trainer.experiments.sweep.record import ENDED, Json, never_begun


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
    idle = never_begun({"trials": trials})
    ended = [t for t in trials if t["status"] in ("failed", "stopped") and t["name"] not in idle]
    failed = {t["seed"]: str(t["reason"]) for t in ended}
    return Arm(name, first["setting"], first["peak_lr"], first["lr_budget"], losses, failed)
