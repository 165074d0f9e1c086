"""Runs sorted into arms: what was varied among them, which belong together, and whether they can be compared at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.verdict import Arm, Purpose
from lora_trainer.report.run_record import RunRecord

MUST_AGREE = ("base content", "data content", "validation content", "validation.seed", "data.resolution")
"""Without these equal, held-out losses do not measure the same thing."""
_LR = "optimizer.lr"
_NO_SETTING = ("seed", "train.threads", "num_processes", "train.gradient_checkpointing", *MUST_AGREE)
_SCHEDULE, _SCHEDULE_TYPE = "lr_scheduler.", "lr_scheduler.type"


@dataclass(frozen=True, slots=True)
class ArmRuns:
    """The runs of one arm: equal in all but the seed."""

    name: str
    setting: str
    runs: tuple[RunRecord, ...]  # by seed
    place: tuple[int, int]  # number of the setting, and of the LR within it: the colour and the dashes of its lines

    @property
    def peak_lr(self) -> float:
        return self.runs[0].peak_lr

    def as_arm(self, purpose: Purpose) -> Arm | None:
        """Its final held-out losses by seed, and the seeds that failed or were stopped; unfinished runs are left out.

        Args:
            purpose: of the runs to look at. None where it has none of them.
        """
        runs = [run for run in self.runs if run.purpose == purpose]
        if not runs:
            return None
        failed = {run.seed: run.failure for run in runs if run.failure is not None}
        finals = {run.seed: run.final for run in runs if run.is_finished and run.seed not in failed}
        losses = {seed: float(final["relative"]) for seed, final in finals.items() if final is not None}
        lr_budget = float(runs[0].plan["lr_groups"][0]["lr_budget"])
        return Arm(self.name, self.setting, self.peak_lr, lr_budget, losses, failed, runs[0].lrs_tried)


def named_runs(groups: Sequence[ArmRuns]) -> list[tuple[str, RunRecord]]:
    """All runs, each with its arm's name, and with the seed where the arm has several."""
    return [
        (group.name if len(group.runs) == 1 else f"{group.name}, seed {run.seed}", run)
        for group in groups
        for run in group.runs
    ]


def varied(records: Sequence[RunRecord]) -> list[str]:
    """The settings that are not equal in all runs; the seed and what only places the work are none."""
    keys = sorted({key for record in records for key in record.identity if not key.startswith("validation.")})
    return [key for key in keys if key not in _NO_SETTING and _differs(records, key)]


def arms(records: Sequence[RunRecord]) -> list[ArmRuns]:
    """Sort runs into arms, in the order of the runs: by the names that a sweep gave, else by what was varied.

    Raises:
        ConfigError: two runs are of one setting and one seed.
    """
    if all(record.arm is not None for record in records):
        names = [(str(record.arm), str(record.setting)) for record in records]
    else:
        names = _names(records)
    members: dict[tuple[str, str], list[RunRecord]] = {name: [] for name in names}
    for name, record in sorted(zip(names, records, strict=True), key=lambda named: named[1].seed):
        members[name].append(record)
    fix = "name one of them"
    twins = [
        Problem(f"two runs have the same settings and seed {run.seed}", f"{run.folder} and {other.folder}", fix=fix)
        for runs in members.values()
        for run, other in pairwise(runs)
        if run.seed == other.seed
    ]
    if twins:
        raise ConfigError(*twins)
    settings = list(dict.fromkeys(setting for _, setting in members))
    lrs = sorted({runs[0].peak_lr for runs in members.values()})
    return [
        ArmRuns(name, setting, tuple(runs), (settings.index(setting), lrs.index(runs[0].peak_lr)))
        for (name, setting), runs in members.items()
    ]


def incompatibilities(records: Sequence[RunRecord]) -> list[str]:
    """Why these runs cannot be compared; empty where they can."""
    what = "so their held-out losses do not measure the same thing"
    reasons = [f"they differ in {key}, {what}" for key in MUST_AGREE if _differs(records, key)]
    if without := [record.name for record in records if not record.probe()]:
        reasons.append(f"held-out loss was not measured in {', '.join(without)} (no `validation` section)")
    return reasons


def check_fresh(records: Sequence[RunRecord]) -> None:
    """Refuse to confirm on seeds that took part in choosing.

    Raises:
        ConfigError: naming the seeds.
    """
    chosen, fresh = ({r.seed for r in records if r.purpose == which} for which in ("selection", "confirmation"))
    if used := sorted(chosen & fresh):
        what = f"seed {', '.join(map(str, used))} took part in choosing, so it cannot confirm"
        raise ConfigError(Problem(what, "--confirm", fix="train the leaders with other seeds"))


def pairing_notes(groups: Sequence[ArmRuns]) -> list[str]:
    """Seeds whose runs did not see the same images, timesteps and noise, by the digests in the log."""
    draws_by_seed: dict[int, list[dict[int, str]]] = {}
    for _, run in named_runs(groups):
        draws_by_seed.setdefault(run.seed, []).append({row["step"]: row["draws"] for row in run.updates})
    loose = [
        str(seed)
        for seed, draws in sorted(draws_by_seed.items())
        if any(len({digests[step] for digests in draws}) > 1 for step in set.intersection(*map(set, draws)))
    ]
    note = f"the runs of seed {', '.join(loose)} did not see the same batches: pairing helps them less"
    return [note] if loose else []


def _differs(records: Sequence[RunRecord], key: str) -> bool:
    return len({_value(record, key) for record in records}) > 1


def _value(record: RunRecord, key: str) -> str:
    return json.dumps(record.identity.get(key), sort_keys=True)


def _names(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Name of the arm and of the setting of each run, from what was varied."""
    keys = varied(records)
    rest = [key for key in keys if key != _LR]
    distinct = {tuple(_value(record, key) for key in (*rest, _SCHEDULE_TYPE)) for record in records}
    num_settings = Counter(schedule for *_, schedule in distinct)
    settings = [_setting_name(r, rest, has_own_type=num_settings[_value(r, _SCHEDULE_TYPE)] == 1) for r in records]
    if len(records) == 1:
        return [(records[0].name, settings[0])]
    lrs = [f", LR {record.peak_lr:.3g}" if _LR in keys else "" for record in records]
    return [(setting + lr, setting) for setting, lr in zip(settings, lrs, strict=True)]


def _setting_name(record: RunRecord, keys: Sequence[str], *, has_own_type: bool) -> str:
    """What tells a setting from the others: the schedule's type, if that does, else the value of each key."""
    schedule = str(record.identity.get(_SCHEDULE_TYPE))
    if _SCHEDULE_TYPE not in keys:
        return ", ".join(_setting(record, key) for key in keys) or schedule
    if has_own_type and all(key.startswith(_SCHEDULE) for key in keys):
        return schedule
    others = [key for key in keys if key != _SCHEDULE_TYPE]
    known = [key for key in others if not key.startswith(_SCHEDULE) or record.identity.get(key) is not None]
    return ", ".join([schedule, *(_setting(record, key) for key in known)])


def _setting(record: RunRecord, key: str) -> str:
    value = record.identity.get(key)
    return f"{key.rpartition('.')[2]} {f'{value:g}' if isinstance(value, float) else value}"
