"""Which trials are trained together: those that share seed, batches and everything but their adapter and optimizer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_trainer.config.identity import difference, identity_fields
from lora_trainer.config.places import GROUPS
from lora_trainer.config.schema import RunConfig, SweepConfig
from lora_trainer.config.trials import TrialConfig
from lora_trainer.experiments.sweep.shared_prefixes import find_prefixes
from lora_trainer.planning.prepare import Prepared
from lora_trainer.training.group import Member, TrialGroup

OF_A_TRIAL = ("adapter", "optimizer", "lr_scheduler", "train.max_grad_norm", "train.ema_decay")
"""Settings that trials of one group may have each for themselves; any other would change what they share."""
SHARED_OUTPUT = ("sample", "checkpoint", "export", "tracking")


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

    groups = [group(name, [by_name[each] for each in names]) for name, names in started.items()]
    for members in together.values():
        same_seed = [one for one in groups if one.members[0].trial.seed == members[0].seed]
        why = _why(same_seed[-1], members[0].config) if same_seed else None
        name = _free_name(f"seed{members[0].seed}", {*taken, *(one.name for one in groups)})
        groups.append(group(name, members, why))
    return groups


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting that the trials of a group have in common."""
    identity = {
        key: value
        for key, value in identity_fields(config).items()
        if not any(key == own or key.startswith(f"{own}.") for own in OF_A_TRIAL)
    }
    plain = config.model_dump(mode="json", include={*SHARED_OUTPUT, "model", "data"})
    return identity | plain


def trials_of(group: TrialGroup, reasons: Mapping[str, str]) -> dict[str, str]:
    """The trials of some arms, each with its arm's reason; none of a group that has begun, which stays as it is."""
    if group.has_begun:
        return {}
    return {member.name: reasons[member.trial.arm] for member in group.members if member.trial.arm in reasons}


def without(group: TrialGroup, names: Collection[str]) -> TrialGroup | None:
    """The group without some of its trials; None where none is left."""
    kept = [member for member in group.members if member.name not in names]
    return replace(group, members=_with_prefixes(kept)) if kept else None


def _with_prefixes(members: Sequence[Member]) -> tuple[Member, ...]:
    """The same members, each with the other whose first updates it shares."""
    prefixes = find_prefixes([member.prepared for member in members])
    return tuple(replace(member, prefix=prefix) for member, prefix in zip(members, prefixes, strict=True))


def _free_name(name: str, taken: Collection[str]) -> str:
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(each for each in numbered if each not in taken)


def _why(before: TrialGroup, config: RunConfig) -> str:
    changes = difference(shared_settings(before.members[0].trial.config), shared_settings(config))
    return f"other than {before.name}: {'; '.join(changes)}" if changes else f"added after {before.name} began"
