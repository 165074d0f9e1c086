"""Which trials are trained together: those that share seed, batches and everything but their adapter and optimizer.

Two trials of a group that differ in their learning rates alone are the same until the first update whose rates differ:
a shared warm-up, or several cooldowns from one plateau. Those updates are computed once; from there on each goes its
own way with a copy of the state. Never imports torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_trainer.config.identity import difference, identity_fields
from lora_trainer.config.places import GROUPS
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.sweep import SweepConfig
from lora_trainer.config.trials import TrialConfig
from lora_trainer.experiments.sweep.record import Json
from lora_trainer.experiments.sweep.results import worse_arms
from lora_trainer.planning.prepare import Prepared
from lora_trainer.training.group import Member, SharedPrefix, TrialGroup

OF_A_TRIAL = ("adapter", "optimizer", "lr_scheduler", "train.max_grad_norm", "train.ema_decay")
"""Settings that trials of one group may have each for themselves; any other would change what they share."""
OF_THE_RATES = ("optimizer.lr", "optimizer.groups", "lr_scheduler")
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
    groups = prepared.lr_groups()
    if any(group.schedule.feedback is not None for group in groups):
        return []
    return [tuple(group.lr(k) for group in groups) for k in range(prepared.plan.num_updates)]


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
