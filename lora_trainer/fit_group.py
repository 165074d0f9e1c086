"""A group of trials from its plan to the files in their folders: `fit` for many adapters on one frozen base."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from accelerate import PartialState

from lora_trainer.assembly import Assembly, assemble
from lora_trainer.checkpoint import Checkpoint, newest_checkpoint
from lora_trainer.config.allowed_changes import refused_keys
from lora_trainer.errors import ConfigError, HostError, Problem
from lora_trainer.fit import training_loop
from lora_trainer.group_recorder import TRUNK, GroupRecorder
from lora_trainer.prepare import results_to_come
from lora_trainer.probing import Probing
from lora_trainer.resume import check_kept_curve, restore
from lora_trainer.runtime import Runtime, start_runtime
from lora_trainer.sweep.groups import TrialGroup
from lora_trainer.sweep.record import began_otherwise
from lora_trainer.tracking.console import Screen
from lora_trainer.trial import TrialSpec

TRIALS, TRIALS_PER_PASS = "trials", "trials_per_pass"
"""Keys of a group's identity in its checkpoints."""


def fit_group(
    group: TrialGroup,
    *,
    screen: Screen,
    should_stop: Callable[[], bool] = lambda: False,
    on_save: Callable[[], None] = lambda: None,
    joined: PartialState | None = None,
) -> None:
    """Train all trials of a group to the end, resuming from its newest checkpoint where there is one.

    Args:
        should_stop: asked after every update; when it says so, the state is saved and the group ends.
        on_save: called after each checkpoint.
        joined: the processes, where several groups are trained in a row.

    Raises:
        StoppedBySignal: `should_stop` said so; the same call resumes.
        TrainerError: the data, base, host or disk is at fault.
    """
    shared = group.shared
    with start_runtime(shared.launch, shared.config.train.precision, shared.threads, joined) as runtime:
        _refuse_fp16(runtime)
        checkpoint = _find_checkpoint(group, runtime, screen)
        if _is_finished(group, checkpoint):
            return
        parts = assemble(
            shared,
            [TrialSpec(member.name, member.prepared.config) for member in group.members],
            runtime,
            screen,
            trials_per_pass=_trials_per_pass(group, checkpoint),
            drop_failed=True,
        )
        screen.say(f"trials per forward: {', '.join(str(len(members)) for members in parts.passes)}")
        start = restore(checkpoint, parts.trials, parts.updater)
        _share_prefixes(group, parts, checkpoint)
        recorder = None
        if runtime.launch.is_main:
            identity = {TRIALS: _identities(group), TRIALS_PER_PASS: parts.trials_per_pass}
            recorder = GroupRecorder(group, runtime, parts, identity, screen, on_save)
            recorder.open(checkpoint)
        try:
            training_loop(
                start, group.num_updates, parts.updater, _probing(group, parts), recorder, screen, should_stop
            )
        finally:
            if recorder is not None:
                recorder.close()
        runtime.wait_for_everyone()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a few updates of a group took on this machine."""

    trials_per_pass: int
    activation_bytes: int
    """Kept by the forward of one trial and one micro-batch."""
    peak_memory_gib: float
    seconds: float
    """For the whole group: its updates, and its probes by their share of the cost."""


def estimate(group: TrialGroup, *, screen: Screen, joined: PartialState | None = None) -> Estimate:
    """Time a group on this machine and data by three updates whose results are thrown away.

    Raises:
        TrainerError: the data, base or host is at fault.
    """
    plan = group.shared.plan
    shared = group.shared
    with start_runtime(shared.launch, shared.config.train.precision, shared.threads, joined) as runtime:
        _refuse_fp16(runtime)
        specs = [TrialSpec(member.name, member.prepared.config) for member in group.members]
        parts = assemble(group.shared, specs, runtime, screen, trials_per_pass=group.trials_per_pass, drop_failed=True)
        seconds = [_timed_update(parts, number) for number in range(3)]
        num_shared = sum(member.fork.step for member in group.members if member.fork is not None)
        work = (group.num_updates * len(group.members) - num_shared) / len(group.members)
        probes = 0.0 if plan.validation is None else plan.validation.cost
        return Estimate(
            parts.trials_per_pass,
            parts.updater.activation_bytes(),
            runtime.peak_memory_gib(),
            min(seconds) * work * (1 + probes),
        )


def _timed_update(parts: Assembly, number: int) -> float:
    started = time.perf_counter()
    parts.updater.run(number, number, stop_asked=False)
    return time.perf_counter() - started


def _refuse_fp16(runtime: Runtime) -> None:
    if runtime.precision == "fp16":
        raise HostError(
            Problem(
                "this GPU has no bf16, and a sweep does not run in fp16",
                "train.precision",
                "one loss scale for all trials would tie them together: a trial's overflow would skip the others'",
                "write train.precision: fp32",
            )
        )


def _find_checkpoint(group: TrialGroup, runtime: Runtime, screen: Screen) -> Checkpoint | None:
    """The group's newest whole checkpoint.

    Raises:
        ConfigError: it holds trials of other settings.
    """
    found, faults = newest_checkpoint(group.folder / "checkpoints") if runtime.launch.is_main else (None, [])
    for fault in faults:
        screen.say(fault)
    found = runtime.from_main(found)
    if found is not None:
        problems = []
        for member in group.members:
            before, own = found.identity[TRIALS].get(member.name, {}), member.prepared
            if refused := refused_keys(before, own.identity(), own.config.resume, "resume"):
                problems.append(began_otherwise(member.name, str(group.folder), before, own, refused))
            check_kept_curve(own)
        if problems:
            raise ConfigError(*problems)
    return found


def _identities(group: TrialGroup) -> dict[str, dict[str, Any]]:
    return {member.name: member.prepared.identity() for member in group.members}


def _is_finished(group: TrialGroup, checkpoint: Checkpoint | None) -> bool:
    """Whether every trial is at its end, with all the files of those that came so far."""
    if checkpoint is None:
        return False
    endings = {name: plain["ending"] for name, plain in checkpoint.state["plain"].items()}
    if checkpoint.progress.step < group.num_updates and None in endings.values():
        return False
    complete = [member.prepared for member in group.members if endings[member.name] is None]
    return all(file.is_file() for own in complete for file in results_to_come(own.config))


def _trials_per_pass(group: TrialGroup, checkpoint: Checkpoint | None) -> int | Literal["auto"]:
    """As the group began: packing is part of the rounding, so a resume repeats it."""
    return group.trials_per_pass if checkpoint is None else int(checkpoint.identity[TRIALS_PER_PASS])


def _share_prefixes(group: TrialGroup, parts: Assembly, checkpoint: Checkpoint | None) -> None:
    """Let the trials whose first updates are equal take them from one; on a resume only those that still do."""
    by_name = {trial.name: trial for trial in parts.trials}
    for member in group.members:
        fork = member.fork
        if fork is not None and (checkpoint is None or checkpoint.state["plain"][member.name][TRUNK] == fork.trunk):
            by_name[member.name].share(by_name[fork.trunk], fork.step)


def _probing(group: TrialGroup, parts: Assembly) -> Probing | None:
    validation = group.shared.plan.validation
    if parts.validator is None or validation is None:
        return None
    return Probing(parts.validator, parts.passes, validation.every, group.num_updates, diverged=group.prune.diverged)
