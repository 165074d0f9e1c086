"""A sweep from its configuration to checked, planned groups of trials, before any work starts. Never imports torch.

Trials are trained together that share seed, batches and everything but their adapter and optimizer. Two of a group that
differ in their learning rates alone are the same until the first update whose rates differ: a shared warm-up, or
several cooldowns from one plateau. Those updates are computed once; from there on each goes its own way with a copy of
the state.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_trainer.config.identity import difference, identity_fields
from lora_trainer.config.places import GROUPS, run_directory
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.sweep_schema import SweepConfig
from lora_trainer.config.trials import TrialConfig
from lora_trainer.data.records import Progress
from lora_trainer.experiments.sweep.record import (
    FEWER_SEEDS,
    NOTHING,
    Json,
    check_continues,
    left_out,
    read_sweep,
    settled_groups,
    started_groups,
    worse_arms,
)
from lora_trainer.models.adapters.targets import can_pack
from lora_trainer.planning.memory import memory_rows
from lora_trainer.planning.prepare import Prepared, prepare, prepare_like
from lora_trainer.planning.rows import notes, plan_rows
from lora_trainer.runtime.launch import Launch
from lora_trainer.storage import disk_space
from lora_trainer.training.group import Member, SharedPrefix, TrialGroup

OF_A_TRIAL = ("adapter", "optimizer", "lr_scheduler", "train.max_grad_norm", "train.ema_decay")
"""Settings that trials of one group may have each for themselves; any other would change what they share."""
OF_THE_RATES = ("optimizer.lr", "optimizer.groups", "lr_scheduler")
SHARED_OUTPUT = ("sample", "checkpoint", "export", "tracking")
SHARED_ROWS = ("images", "global batch", "updates per epoch", "updates", "base", "validation")
"""Rows of a run's plan that hold for all trials of a group."""


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
        ConfigError, DataError, ModelError, SystemSetupError: each with all problems of its kind.
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
    """The plan of every trial; base and data are read once for all that share them, split as the started ones are."""
    firsts: dict[str, Prepared] = {}
    prepared = {}
    for trial in sorted(trials, key=lambda trial: trial.name not in started):
        key = json.dumps(shared_settings(trial.config) | {"seed": None}, sort_keys=True)
        continues = trial.name in started
        if key in firsts:
            prepared[trial.name] = prepare_like(firsts[key], trial.config, continues=continues)
        else:
            prepared[trial.name] = firsts[key] = prepare(trial.config, launch, progress, continues=continues)
    return {trial.name: prepared[trial.name] for trial in trials}


def _check_room(groups: Sequence[TrialGroup], sweep_dir: Path) -> None:
    """The LoRA files of all trials, and the checkpoints of every group."""
    needed = -disk_space.size_of(sweep_dir / GROUPS)
    for member in (member for group in groups for member in group.members):
        config, plan = member.prepared.config, member.prepared.plan
        one = plan.checkpoint_bytes(with_average=config.train.ema_decay is not None)
        needed += (config.checkpoint.keep_last + 1) * one + plan.export_bytes(config.export.dtype)
    disk_space.check_room(sweep_dir, needed, "checkpoints and LoRA files of all trials")


def group_trials(
    trials: Sequence[TrialConfig],
    prepared: Mapping[str, Prepared],
    sweep_dir: Path,
    options: SweepConfig,
    started: Mapping[str, Sequence[str]],
    *,
    taken: Collection[str] = (),
) -> list[TrialGroup]:
    """The groups of a sweep, in the order of their first trials.

    Args:
        prepared: by trial; those that differ in the seed and in `OF_A_TRIAL` alone are on one base and data.
        started: trials of each group that an earlier start began; these stay as they are.
        taken: names of groups that are finished.
    """
    by_name = {trial.name: trial for trial in trials}
    placed = {name for names in started.values() for name in names}
    together: dict[str, list[TrialConfig]] = {}
    for trial in trials:
        if trial.name not in placed:
            together.setdefault(json.dumps(shared_settings(trial.config), sort_keys=True), []).append(trial)

    def group(name: str, members: Sequence[TrialConfig], why: str | None = None) -> TrialGroup:
        planned = _with_prefixes([Member(trial, prepared[trial.name]) for trial in members])
        folder = sweep_dir / GROUPS / name
        return TrialGroup(name, folder, planned, options.trials_per_pass, options.prune, why=why)

    groups = [group(name, [by_name[trial] for trial in names]) for name, names in started.items()]
    for members in together.values():
        same_seed = [other for other in groups if other.members[0].trial.seed == members[0].seed]
        why = _why(same_seed[-1], members[0].config) if same_seed else None
        name = _free_name(f"seed{members[0].seed}", {*taken, *(other.name for other in groups)})
        groups.append(group(name, members, why))
    return groups


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting that the trials of a group have in common."""
    return _identity_without(OF_A_TRIAL, config) | config.model_dump(
        mode="json", include={*SHARED_OUTPUT, "model", "data"}
    )


def _identity_without(keys: Sequence[str], config: RunConfig) -> dict[str, Any]:
    """The settings of a config's identity but for these keys and sections."""
    fields = identity_fields(config).items()
    return {name: value for name, value in fields if not any(name == k or name.startswith(f"{k}.") for k in keys)}


def trials_of(group: TrialGroup, reasons: Mapping[str, str]) -> dict[str, str]:
    """The trials of some arms, each with its arm's reason; none of a group that has begun, which stays as it is."""
    if group.has_begun:
        return {}
    return {member.name: reasons[member.trial.arm] for member in group.members if member.trial.arm in reasons}


def trials_to_drop(group: TrialGroup, content: Json) -> dict[str, str]:
    """The trials of a group that are not worth a further seed by the record of the others, with the reason."""
    after = group.prune.worse_after_seeds
    if after is None:
        return {}
    return trials_of(group, worse_arms(content, after, len({trial["seed"] for trial in content["trials"]})))


def without(group: TrialGroup, names: Collection[str]) -> TrialGroup | None:
    """The group without some of its trials; None where none is left."""
    kept = [member for member in group.members if member.name not in names]
    return replace(group, members=_with_prefixes(kept)) if kept else None


def _with_prefixes(members: Sequence[Member]) -> tuple[Member, ...]:
    """The same members, each with the earlier one with which it shares most updates, where it shares any."""
    others = [_other_settings(member.prepared.config) for member in members]
    rates = [_rates(member.prepared) for member in members]
    linked = []
    for index, member in enumerate(members):
        shared = [_num_equal(rates[index], rates[k]) if others[index] == others[k] else 0 for k in range(index)]
        longest = max(shared, default=0)
        prefix = SharedPrefix(members[shared.index(longest)].name, longest) if longest else None
        linked.append(replace(member, prefix=prefix))
    return tuple(linked)


def _rates(prepared: Prepared) -> list[tuple[float, ...]]:
    """The learning rates of each update by LR group; empty where they are not known beforehand."""
    groups = prepared.param_groups()
    if any(group.schedule.feedback is not None for group in groups):
        return []
    return [tuple(group.lr(k) for group in groups) for k in range(prepared.plan.num_steps)]


def _other_settings(config: RunConfig) -> tuple[dict[str, Any], list[Any]]:
    """All that decides a trial's updates beside their rates."""
    return _identity_without(OF_THE_RATES, config), [(group.name, group.match) for group in config.optimizer.groups]


def _num_equal(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the start that two sequences have in common."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _free_name(name: str, taken: Collection[str]) -> str:
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in numbered if candidate not in taken)


def _why(before: TrialGroup, config: RunConfig) -> str:
    changes = difference(shared_settings(before.members[0].trial.config), shared_settings(config))
    return f"other than {before.name}: {'; '.join(changes)}" if changes else f"added after {before.name} began"


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
        most, per_pass = max(group.members, key=lambda m: m.prepared.plan.num_parameters), group.trials_per_pass
        packed = 1 if per_pass == "auto" else min(per_pass, len(group.members))
        yield from memory_rows(most.prepared, len(group.members), packed)
    total = sum(group.num_steps * len(group.members) for group in sweep.groups)
    shared = sum(member.prefix.step for member in members if member.prefix is not None)
    yield "work", f"{total - shared:,} updates of one trial" + (f"; {shared:,} more are shared" if shared else "")
    for member in members:
        lrs = member.prepared.plan.param_groups[0]
        yield member.name, f"{lrs.schedule}: peak {lrs.lr_peak:.3e}, budget {lrs.lr_budget:.2f}"
        yield from (("", f"warning: {warning}") for warning in lrs.warnings)
    yield from (("note", note) for note in dict.fromkeys(note for m in members for note in notes(m.prepared)))


def _group_in_words(group: TrialGroup) -> str:
    alone = sum(not can_pack(member.prepared.config.adapter) for member in group.members)
    per_pass = group.trials_per_pass
    how = "as many per pass as memory allows" if per_pass == "auto" else f"{per_pass} per pass"
    one_by_one = f", {alone} of them alone (DoRA or dropout)" if alone else ""
    return f"{_counted(len(group.members), 'trial')} x {group.num_steps} updates, {how}{one_by_one}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
