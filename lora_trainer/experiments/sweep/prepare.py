"""A sweep from its configuration to checked, planned groups of trials, before any work starts. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_trainer.config.places import GROUPS, run_directory
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.trials import TrialConfig
from lora_trainer.data.records import Progress
from lora_trainer.experiments.sweep.groups import group_trials, shared_settings, without
from lora_trainer.experiments.sweep.record import (
    NOTHING,
    Json,
    check_continues,
    left_out,
    read_sweep,
    settled_groups,
    started_groups,
)
from lora_trainer.experiments.sweep.results import FEWER_SEEDS
from lora_trainer.models.adapters.packing import can_pack
from lora_trainer.planning.prepare import Prepared, plan_rows, prepare, prepare_like
from lora_trainer.runtime.launch import Launch
from lora_trainer.storage import disk_space
from lora_trainer.training.group import TrialGroup

SHARED_ROWS = ("images", "global batch", "updates per epoch", "updates", "base", "validation")
"""Rows of a run's plan that hold for all trials of a group."""

BYTES_PER_PARAMETER = 4 * 4
"""Adapter, gradient and two moments in fp32."""


@dataclass(frozen=True, slots=True)
class PreparedSweep:
    """A sweep that is checked and planned."""

    config: RunConfig
    groups: tuple[TrialGroup, ...]
    """Those that are not known to be finished."""
    before: Json
    """What an earlier start recorded, or `NOTHING`."""

    def left_with(self, dropped: Collection[str]) -> PreparedSweep:
        """The same without some trials."""
        groups = (without(group, dropped) for group in self.groups)
        return replace(self, groups=tuple(group for group in groups if group is not None))


def prepare_sweep(
    config: RunConfig, trials: Sequence[TrialConfig], launch: Launch, progress: Progress
) -> PreparedSweep:
    """Check base, data, every trial's plan, the room on the disk and what an earlier start left.

    Raises:
        ConfigError, DataError, ModelError, HostError: each with all problems of its kind.
    """
    assert config.sweep is not None
    sweep_dir = run_directory(config)
    before = read_sweep(sweep_dir) or NOTHING
    started = started_groups(before, sweep_dir)
    prepared = _prepare_trials(trials, {name for names in started.values() for name in names}, launch, progress)
    settled = settled_groups(before, prepared)
    check_continues(before, prepared, sweep_dir, settled)
    gone = {name for group in settled for name in started.get(group, ())}
    if config.sweep.prune.worse_after_seeds is not None:  # decided on the seeds of that moment, so it stays
        gone |= {name for name, reason in left_out(before).items() if reason.startswith(FEWER_SEEDS)}
    groups = group_trials(
        [trial for trial in trials if trial.name not in gone],
        prepared,
        sweep_dir,
        config.sweep,
        {name: members for name, members in started.items() if name not in settled},
        taken=settled,
    )
    _check_room(groups, sweep_dir)
    return PreparedSweep(config, tuple(groups), before)


def _prepare_trials(
    trials: Sequence[TrialConfig], started: Collection[str], launch: Launch, progress: Progress
) -> dict[str, Prepared]:
    """The plan of every trial; base and data are read once for all that share them."""
    firsts: dict[str, Prepared] = {}
    prepared = {}
    for trial in trials:
        key = json.dumps(shared_settings(trial.config) | {"seed": None}, sort_keys=True)
        continues = trial.name in started
        if key in firsts:
            prepared[trial.name] = prepare_like(firsts[key], trial.config, continues=continues)
        else:
            prepared[trial.name] = firsts[key] = prepare(trial.config, launch, progress, continues=continues)
    return prepared


def _check_room(groups: Sequence[TrialGroup], sweep_dir: Path) -> None:
    """The LoRA files of all trials, and the checkpoints of every group."""
    needed = -disk_space.size_of(sweep_dir / GROUPS)
    for member in (member for group in groups for member in group.members):
        config, plan = member.prepared.config, member.prepared.plan
        one = plan.checkpoint_bytes(with_average=config.train.ema_decay is not None)
        needed += (config.checkpoint.keep_last + 1) * one + plan.export_bytes(config.export.dtype)
    disk_space.check_room(sweep_dir, needed, "checkpoints and LoRA files of all trials")


def sweep_rows(sweep: PreparedSweep) -> Iterator[tuple[str, str]]:
    """The plan in words, row by row."""
    members = [member for group in sweep.groups for member in group.members]
    num_arms, num_seeds = len({m.trial.arm for m in members}), len({m.trial.seed for m in members})
    yield "trials", f"{len(members)} to train: {_counted(num_arms, 'arm')} x {_counted(num_seeds, 'seed')}"
    if known := {trial["name"] for trial in sweep.before["trials"]} - {member.name for member in members}:
        yield "", f"{len(known)} more are finished and stay as they are"
    for group in sweep.groups:
        yield f"group {group.name}", _group_in_words(group)
        if group.why:
            yield "", f"a group of its own: {group.why}"
    for group in sweep.groups[:1]:
        shown = ""
        for name, value in plan_rows(group.shared):
            shown = name or shown
            if shown in SHARED_ROWS:
                yield name, value
        states = disk_space.mib(sum(m.prepared.plan.num_parameters * BYTES_PER_PARAMETER for m in group.members))
        yield "memory", f"adapters, gradients and moments of a group: {states}, beside base and activations"
    total = sum(group.num_updates * len(group.members) for group in sweep.groups)
    shared = sum(member.prefix.step for member in members if member.prefix is not None)
    yield "work", f"{total - shared:,} updates of one trial" + (f"; {shared:,} more are shared" if shared else "")
    for member in members:
        lrs = member.prepared.plan.lr_groups[0]
        yield member.name, f"{lrs.schedule}: peak {lrs.lr_peak:.3e}, budget {lrs.lr_budget:.2f}"
        yield from (("", f"warning: {warning}") for warning in lrs.warnings)


def _group_in_words(group: TrialGroup) -> str:
    alone = sum(not can_pack(member.prepared.config.adapter) for member in group.members)
    per_pass = group.trials_per_pass
    how = "as many per pass as memory allows" if per_pass == "auto" else f"{per_pass} per pass"
    one_by_one = f", {alone} of them alone (DoRA or dropout)" if alone else ""
    return f"{_counted(len(group.members), 'trial')} x {group.num_updates} updates, {how}{one_by_one}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
