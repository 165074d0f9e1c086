"""Which settings of a run may differ when it is continued, as `resume` in the config says."""

from __future__ import annotations

import difflib
from typing import Any

from lora_trainer.config.identity import CURVE_LENGTH, changed_keys, difference
from lora_trainer.config.schema import ResumeConfig
from lora_trainer.errors import ConfigError, Problem

SHAPES_THE_STATE = (
    "adapter.type",
    "adapter.rank",
    "adapter.targets",
    "adapter.use_dora",
    "optimizer.type",
    "optimizer.groups",
    "train.ema_decay",
)
"""Settings whose change would leave saved tensors without a place, or places without a tensor."""


def accepted_changes(before: dict[str, Any], now: dict[str, Any], allowed: ResumeConfig, where: str) -> list[str]:
    """What differs from the checkpoint's run, one line per key, where `resume` in the config accepts all of it.

    Raises:
        ConfigError: naming every other setting and content that differs, or what cannot be allowed.
    """
    if refused := refused_keys(before, now, allowed, where):
        listed = "\n         ".join(difference(before, now, refused))
        raise ConfigError(
            Problem(
                "this run directory holds a run with other settings",
                where,
                f"changed since:\n         {listed}",
                "set the old values to resume it, accept the change with "
                f"'resume.allow_changes=[{', '.join(refused)}]', give the new run another `name`, "
                "or start anew with --fresh",
            )
        )
    return difference(before, now)


def refused_keys(before: dict[str, Any], now: dict[str, Any], allowed: ResumeConfig, where: str) -> list[str]:
    """The settings and contents that differ although `resume` does not allow it.

    Raises:
        ConfigError: what it allows is no setting, or cannot change.
    """
    _check_allowed(allowed, {*before, *now}, where)
    accepted = [*allowed.allow_changes, *([CURVE_LENGTH] if allowed.schedule == "stretch" else [])]
    return [key for key in changed_keys(before, now) if not any(_covers(own, key) for own in accepted)]


def _check_allowed(allowed: ResumeConfig, keys: set[str], where: str) -> None:
    problems = []
    for own in allowed.allow_changes:
        if any(_covers(own, fixed) or _covers(fixed, own) for fixed in SHAPES_THE_STATE):
            problems.append(
                Problem(
                    f"`{own}` cannot change in a run",
                    where,
                    "the saved adapter, optimizer or average would not fit",
                    "take it out of resume.allow_changes and start a run with another `name`",
                )
            )
        elif not any(_covers(own, key) for key in keys):
            near = difflib.get_close_matches(own, sorted(keys), n=1)
            guess = f"; did you mean `{near[0]}`?" if near else ""
            problems.append(Problem(f"`{own}` in resume.allow_changes is no setting of a run's identity{guess}", where))
    if problems:
        raise ConfigError(*problems)


def _covers(allowed: str, key: str) -> bool:
    """A section's name covers all its keys."""
    return key == allowed or key.startswith(allowed + ".")
