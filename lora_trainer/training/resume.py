"""Where a run goes on: its newest whole checkpoint, whether these settings may continue it, and its return to it."""

from __future__ import annotations

from collections.abc import Sequence

from lora_trainer.config.allowed_changes import accepted_changes
from lora_trainer.config.places import lora_file
from lora_trainer.errors import ConfigError, HostError, Problem
from lora_trainer.planning.prepare import Prepared
from lora_trainer.planning.run_plan import lay_groups
from lora_trainer.runtime.runtime import Runtime
from lora_trainer.storage.checkpoint import Checkpoint, Progress, newest_checkpoint
from lora_trainer.tracking.console import Screen
from lora_trainer.training.optimizer_step import Updater
from lora_trainer.training.trial import Trial


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
        check_kept_curve(prepared)
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


def check_kept_curve(prepared: Prepared) -> None:
    """Refuse to go on along a curve that ended at 0.

    Raises:
        ConfigError: the updates after its end would do nothing.
    """
    plan = prepared.plan
    length = plan.lr_horizon.num_updates
    groups = lay_groups(prepared.config, plan.lr_horizon)
    if plan.num_updates > length and all(group.lr(length) == 0 for group in groups):
        raise ConfigError(
            Problem(
                f"the LR curve of this run ends at 0 after {length} updates: {plan.num_updates - length} more would "
                "learn nothing",
                f"{prepared.config.name}, resume.schedule",
                "`keep` holds the curve's last value",
                "write resume.schedule: stretch, which lays the curve over the new length",
            )
        )


def restore(checkpoint: Checkpoint | None, trials: Sequence[Trial], updater: Updater) -> Progress:
    """Bring trials and updater to the checkpoint's state; where to go on."""
    if checkpoint is None:
        return Progress()
    parts, plain = checkpoint.parts(), checkpoint.state["plain"]
    for trial in trials:
        trial.load_state(parts, plain[trial.name])
    updater.load_state(checkpoint.state["scaler"])
    return checkpoint.progress
