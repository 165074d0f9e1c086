"""A sweep from its configuration to checked, planned groups of trials, before any work starts. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_trainer.config.places import run_directory
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.trials import TrialConfig
from lora_trainer.data.records import Progress
from lora_trainer.experiments.sweep.fewer_seeds import RULE as FEWER_SEEDS
from lora_trainer.experiments.sweep.groups import group_trials, shared_settings, without
from lora_trainer.experiments.sweep.record import (
    Json,
    check_continues,
    never_begun,
    read_sweep,
    settled_groups,
    started_groups,
)
from lora_trainer.models.adapters.targets import can_pack
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
    before: Json | None
    """What an earlier start recorded."""

    @property
    def sweep_dir(self) -> Path:
        return run_directory(self.config)

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
    before = read_sweep(sweep_dir)
    started = started_groups(before, sweep_dir)
    prepared = _prepare_trials(trials, {name for names in started.values() for name in names}, launch, progress)
    done = settled_groups(before, prepared)
    check_continues(before, prepared, sweep_dir, done)
    gone = {name for group in done for name in started.get(group, ())}
    if config.sweep.prune.worse_after_seeds is not None:  # decided on the seeds of that moment, so it stays
        gone |= {name for name, reason in never_begun(before).items() if reason.startswith(FEWER_SEEDS)}
    groups = group_trials(
        [trial for trial in trials if trial.name not in gone],
        prepared,
        sweep_dir,
        config.sweep,
        {name: members for name, members in started.items() if name not in done},
        taken=done,
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
        shared = {key: value for key, value in shared_settings(trial.config).items() if key != "seed"}
        key, continues = json.dumps(shared, sort_keys=True), trial.name in started
        if key in firsts:
            prepared[trial.name] = prepare_like(firsts[key], trial.config, continues=continues)
        else:
            prepared[trial.name] = firsts[key] = prepare(trial.config, launch, progress, continues=continues)
    return prepared


def _check_room(groups: Sequence[TrialGroup], sweep_dir: Path) -> None:
    """The LoRA files of all trials, and the checkpoints of every group."""
    needed = 0
    for group in groups:
        for member in group.members:
            config, plan = member.prepared.config, member.prepared.plan
            one = plan.checkpoint_bytes(with_average=config.train.ema_decay is not None)
            needed += (config.checkpoint.keep_last + 1) * one + plan.export_bytes(config.export.dtype)
    disk_space.check_room(
        sweep_dir, needed - disk_space.size_of(sweep_dir / "groups"), "checkpoints and LoRA files of all trials"
    )


def sweep_rows(sweep: PreparedSweep) -> Iterator[tuple[str, str]]:
    """The plan in words, row by row."""
    members = [member for group in sweep.groups for member in group.members]
    arms = {member.trial.arm for member in members}
    seeds = {member.trial.seed for member in members}
    yield "trials", f"{len(members)} to train: {_counted(len(arms), 'arm')} x {_counted(len(seeds), 'seed')}"
    if sweep.before is not None:
        known = {trial["name"] for trial in sweep.before["trials"]} - {member.name for member in members}
        if known:
            yield "", f"{len(known)} more are finished and stay as they are"
    for group in sweep.groups:
        yield f"group {group.name}", _group_in_words(group)
        if group.why:
            yield "", f"a group of its own: {group.why}"
    shown = None
    for name, value in plan_rows(sweep.groups[0].shared) if sweep.groups else ():
        shown = name or shown
        if shown in SHARED_ROWS:
            yield name, value
    for group in sweep.groups[:1]:
        states = sum(member.prepared.plan.num_parameters * BYTES_PER_PARAMETER for member in group.members)
        yield (
            "memory",
            f"adapters, gradients and moments of a group: {disk_space.mib(states)}, beside base and activations",
        )
    total = sum(group.num_updates * len(group.members) for group in sweep.groups)
    shared = sum(m.prefix.step for group in sweep.groups for m in group.members if m.prefix is not None)
    yield "work", f"{total - shared:,} updates of one trial" + (f"; {shared:,} more are shared" if shared else "")
    for member in members:
        lrs = member.prepared.plan.lr_groups[0]
        yield member.name, f"{lrs.schedule}: peak {lrs.lr_peak:.3e}, budget {lrs.lr_budget:.2f}"
        yield from (("", f"warning: {warning}") for warning in lrs.warnings)


def _group_in_words(group: TrialGroup) -> str:
    alone = sum(not can_pack(member.prepared.config.adapter) for member in group.members)
    packed = len(group.members) - alone
    how = (
        f"{group.trials_per_pass} per pass" if group.trials_per_pass != "auto" else "as many per pass as memory allows"
    )
    one_by_one = f", {alone} of them alone (DoRA or dropout)" if alone else ""
    return f"{_counted(packed + alone, 'trial')} x {group.num_updates} updates, {how}{one_by_one}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
