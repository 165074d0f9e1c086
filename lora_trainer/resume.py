"""Where a run goes on: its newest whole checkpoint, whether these settings may continue it, and its return to it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from lora_trainer.checkpoint import Checkpoint, Progress, newest_checkpoint
from lora_trainer.config.identity import CURVE_LENGTH, changed_keys, difference
from lora_trainer.config.places import lora_file
from lora_trainer.config.schema import ResumeConfig
from lora_trainer.errors import ConfigError, HostError, Problem
from lora_trainer.plan import lay_groups
from lora_trainer.prepare import Prepared
from lora_trainer.runtime import Runtime
from lora_trainer.tracking.console import Screen
from lora_trainer.trial import Trial
from lora_trainer.update import Updater

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


def find_checkpoint(prepared: Prepared, runtime: Runtime, screen: Screen) -> Checkpoint | None:
    """The newest whole checkpoint of this run; None where it starts at its beginning, which is said if it did before.

    Raises:
        ConfigError: the run directory holds a run with another identity.
        HostError: there were checkpoints and none can be read, or a finished run has lost them.
    """
    found = _newest(prepared, screen) if runtime.launch.is_main else None
    found = runtime.from_main(found)
    if found is not None:
        changes = accepted_changes(found.identity, prepared.identity(), prepared.config.resume, str(prepared.run_dir))
        for change in changes:
            screen.say(f"changed since the last start, as resume allows: {change}")
        _check_kept_curve(prepared)
    return found


def _newest(prepared: Prepared, screen: Screen) -> Checkpoint | None:
    found, faults = newest_checkpoint(prepared.run_dir / "checkpoints")
    for fault in faults:
        screen.say(fault)
    if found is None and lora_file(prepared.config).exists():
        raise HostError(
            Problem(
                "this run has its LoRA but no checkpoint, so nothing could be continued",
                str(prepared.run_dir),
                "its checkpoints were removed, or the disk never took one",
                "start anew with --fresh (the old run is kept beside it), or give the new run another `name`",
            )
        )
    if found is None and (prepared.run_dir / "metrics.jsonl").exists():
        screen.say("an earlier start ended before its first checkpoint; this one begins at step 0 again")
    return found


def accepted_changes(before: dict[str, Any], now: dict[str, Any], allowed: ResumeConfig, where: str) -> list[str]:
    """What differs from the checkpoint's run, one line per key, where `resume` in the config accepts all of it.

    Raises:
        ConfigError: naming every other setting and content that differs, or what cannot be allowed.
    """
    _check_allowed(allowed, {*before, *now}, where)
    accepted = [*allowed.allow_changes, *([CURVE_LENGTH] if allowed.schedule == "stretch" else [])]
    refused = [key for key in changed_keys(before, now) if not any(_covers(own, key) for own in accepted)]
    if refused:
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


def _check_kept_curve(prepared: Prepared) -> None:
    """A kept curve that ended at 0 would make the updates after its end do nothing."""
    plan = prepared.plan
    length = plan.lr_horizon.num_updates
    groups = lay_groups(prepared.config, plan.lr_horizon)
    if plan.num_updates > length and all(group.lr(length) == 0 for group in groups):
        raise ConfigError(
            Problem(
                f"the LR curve of this run ends at 0 after {length} updates: {plan.num_updates - length} more would "
                "learn nothing",
                "resume.schedule",
                "`keep` holds the curve's last value",
                "write resume.schedule: stretch, which lays the curve over the new length",
            )
        )


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


def restore(checkpoint: Checkpoint | None, trials: Sequence[Trial], updater: Updater) -> Progress:
    """Bring trials and updater to the checkpoint's state; where to go on."""
    if checkpoint is None:
        return Progress()
    parts, plain = checkpoint.parts(), checkpoint.state["plain"]
    for trial in trials:
        trial.load_state(parts, plain[trial.name])
    updater.load_state(checkpoint.state["scaler"])
    return checkpoint.progress
