"""What a sweep's record says of its arms, as the verdicts want it. Never imports torch."""

from __future__ import annotations

from lora_trainer.evidence.statistics.arms import Arm
from lora_trainer.experiments.sweep.record import ENDED, Json


def unfinished_trials(content: Json) -> list[str]:
    """Trials that will go on."""
    return [trial["name"] for trial in content["trials"] if trial["status"] not in ENDED]


def arms_of(content: Json) -> list[Arm]:
    """Every arm with the held-out losses of its finished seeds and the reasons of its failed ones, in their order."""
    rows: dict[str, list[Json]] = {}
    for trial in content["trials"]:
        rows.setdefault(trial["arm"], []).append(trial)
    return [_arm(name, trials) for name, trials in rows.items()]


def _arm(name: str, trials: list[Json]) -> Arm:
    first = trials[0]
    losses = {t["seed"]: float(t["final"]["relative"]) for t in trials if t["final"] is not None}
    failed = {t["seed"]: str(t["reason"]) for t in trials if t["status"] == "failed"}
    return Arm(name, first["setting"], first["peak_lr"], first["lr_budget"], losses, failed)
