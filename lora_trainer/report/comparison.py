"""Runs sorted into arms: what was varied among them, which belong together, and whether they can be compared at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.arms import Arm, Purpose
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
    runs: tuple[RunRecord, ...]
    """By seed."""
    place: tuple[int, int]
    """Number of the setting, and of the LR within it: the colour and the dashes of its lines."""

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
    keys = sorted({key for record in records for key in record.identity})
    settings = [key for key in keys if key not in _NO_SETTING and not key.startswith("validation.")]
    return [key for key in settings if _differs(records, key)]


def arms(records: Sequence[RunRecord]) -> list[ArmRuns]:
    """Sort runs into arms, in the order of the runs: by the names that a sweep gave, else by what was varied.

    Raises:
        ConfigError: two runs are of one setting and one seed.
    """
    if all(record.arm is not None for record in records):
        names = [(str(record.arm), str(record.setting)) for record in records]
    else:
        names = _names(records)
    members: dict[tuple[str, str], list[RunRecord]] = {}
    for name, record in zip(names, records, strict=True):
        members.setdefault(name, []).append(record)
    by_seed = {name: sorted(runs, key=lambda run: run.seed) for name, runs in members.items()}
    fix = "name one of them"
    twins = [
        Problem(f"two runs have the same settings and seed {run.seed}", f"{run.folder} and {other.folder}", fix=fix)
        for runs in by_seed.values()
        for run, other in pairwise(runs)
        if run.seed == other.seed
    ]
    if twins:
        raise ConfigError(*twins)
    settings = list(dict.fromkeys(setting for _, setting in by_seed))
    lrs = sorted({runs[0].peak_lr for runs in by_seed.values()})
    return [
        ArmRuns(name, setting, tuple(runs), (settings.index(setting), lrs.index(runs[0].peak_lr)))
        for (name, setting), runs in by_seed.items()
    ]


def incompatibilities(records: Sequence[RunRecord]) -> list[str]:
    """Why these runs cannot be compared; empty where they can."""
    reasons = [
        f"they differ in {key}, so their held-out losses do not measure the same thing"
        for key in MUST_AGREE
        if _differs(records, key)
    ]
    without = [record.name for record in records if not record.probe()]
    if without:
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
    if not loose:
        return []
    return [f"the runs of seed {', '.join(loose)} did not see the same batches: pairing helps them less"]


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
    names = []
    for record in records:
        setting = _setting_name(record, rest, has_own_type=num_settings[_value(record, _SCHEDULE_TYPE)] == 1)
        name = f"{setting}, LR {record.peak_lr:.3g}" if _LR in keys else setting
        names.append((name if len(records) > 1 else record.name, setting))
    return names


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
