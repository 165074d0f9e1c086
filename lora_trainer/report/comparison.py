"""Runs sorted into arms: what was varied among them, which belong together, and whether they can be compared at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.arms import Arm
from lora_trainer.evidence.statistics.verdict import Purpose
from lora_trainer.report.run_record import RunRecord

MUST_AGREE = ("base content", "data content", "validation content", "validation.seed", "data.resolution")
"""Without these equal, held-out losses do not measure the same thing."""
_LR = "optimizer.lr"
_NO_SETTING = ("seed", "train.threads", "num_processes", "train.gradient_checkpointing", *MUST_AGREE)
_SCHEDULE = "lr_scheduler."


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
        return _lr(self.runs[0])

    @property
    def lr_budget(self) -> float:
        return float(self.runs[0].plan["lr_groups"][0]["lr_budget"])

    def name_of(self, run: RunRecord) -> str:
        """The arm's name, with the seed where it has several."""
        return self.name if len(self.runs) == 1 else f"{self.name}, seed {run.seed}"

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
        return Arm(self.name, self.setting, self.peak_lr, self.lr_budget, losses, failed, self.runs[0].lrs_tried)


def varied(records: Sequence[RunRecord]) -> list[str]:
    """The settings that are not equal in all runs; the seed and what only places the work are none."""
    keys = sorted({key for record in records for key in record.identity})
    return [key for key in keys if not _is_no_setting(key) and len({_value(r, key) for r in records}) > 1]


def arms(records: Sequence[RunRecord]) -> list[ArmRuns]:
    """Sort runs into arms, in the order of the runs: by the names that a sweep gave, else by what was varied.

    Raises:
        ConfigError: two runs are of one setting and one seed.
    """
    if all(record.arm is not None for record in records):
        named = [(str(record.arm), str(record.setting)) for record in records]
    else:
        named = _names(records)
    found: dict[tuple[str, str], list[RunRecord]] = {}
    for names, record in zip(named, records, strict=True):
        found.setdefault(names, []).append(record)
    _refuse_doubles(found.values())
    settings = list(dict.fromkeys(setting for _, setting in found))
    lrs = sorted({_lr(runs[0]) for runs in found.values()})
    return [
        ArmRuns(
            name,
            setting,
            tuple(sorted(runs, key=lambda run: run.seed)),
            (settings.index(setting), lrs.index(_lr(runs[0]))),
        )
        for (name, setting), runs in found.items()
    ]


def hindrances(records: Sequence[RunRecord]) -> list[str]:
    """Why these runs cannot be compared; empty where they can."""
    found = [
        f"they differ in {key}, so their held-out losses do not measure the same thing"
        for key in MUST_AGREE
        if len({_value(record, key) for record in records}) > 1
    ]
    without = [record.name for record in records if not record.probe()]
    if without:
        found.append(f"held-out loss was not measured in {', '.join(without)} (no `validation` section)")
    return found


def check_fresh(records: Sequence[RunRecord]) -> None:
    """Refuse to confirm on seeds that took part in choosing.

    Raises:
        ConfigError: naming the seeds.
    """
    seeds = {
        purpose: {record.seed for record in records if record.purpose == purpose}
        for purpose in ("selection", "confirmation")
    }
    used = sorted(seeds["selection"] & seeds["confirmation"])
    if used:
        raise ConfigError(
            Problem(
                f"seed {', '.join(map(str, used))} took part in choosing, so it cannot confirm",
                "--confirm",
                fix="train the leaders with other seeds",
            )
        )


def pairing_notes(groups: Sequence[ArmRuns]) -> list[str]:
    """Seeds whose runs did not see the same images, timesteps and noise, by the digests in the log."""
    by_seed: dict[int, list[RunRecord]] = {}
    for group in groups:
        for run in group.runs:
            by_seed.setdefault(run.seed, []).append(run)
    loose = []
    for seed, runs in sorted(by_seed.items()):
        digests = [{row["step"]: row["draws"] for row in run.updates} for run in runs]
        common = set.intersection(*map(set, digests))
        if any(len({own[step] for own in digests}) > 1 for step in common):
            loose.append(str(seed))
    if not loose:
        return []
    return [f"the runs of seed {', '.join(loose)} did not see the same batches: pairing helps them less"]


def _lr(record: RunRecord) -> float:
    return float(record.identity[_LR])


def _names(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Name of the arm and of the setting of each run, from what was varied."""
    keys = varied(records)
    rest = [key for key in keys if key != _LR]
    settings = dict.fromkeys((tuple(_value(record, key) for key in rest) for record in records), "")
    _name_settings(settings, records, rest)
    named = []
    for record in records:
        setting = settings[tuple(_value(record, key) for key in rest)]
        named.append((_arm_name(setting, _lr(record), _LR in keys, records), setting))
    return named


def _is_no_setting(key: str) -> bool:
    return key in _NO_SETTING or key.startswith("validation.")


def _value(record: RunRecord, key: str) -> str:
    return json.dumps(record.identity.get(key), sort_keys=True)


def _name_settings(settings: dict[tuple[str, ...], str], records: Sequence[RunRecord], keys: Sequence[str]) -> None:
    """Fill in the shortest name of each setting that tells it from the others: the schedule's type, if that does."""
    types = {values: json.loads(values[keys.index(f"{_SCHEDULE}type")]) for values in settings} if _typed(keys) else {}
    for values in settings:
        own = [name for name in types.values() if name == types.get(values)]
        only_schedules = all(key.startswith(_SCHEDULE) for key in keys)
        if types and only_schedules and len(own) == 1:
            settings[values] = types[values]
            continue
        told = [
            _told(key, json.loads(value))
            for key, value in zip(keys, values, strict=True)
            if not (types and key.startswith(_SCHEDULE) and value == "null") and key != f"{_SCHEDULE}type"
        ]
        settings[values] = ", ".join([*([types[values]] if types else []), *told]) or _schedule(records[0])


def _typed(keys: Sequence[str]) -> bool:
    return f"{_SCHEDULE}type" in keys


def _schedule(record: RunRecord) -> str:
    return str(record.identity.get(f"{_SCHEDULE}type", record.name))


def _told(key: str, value: Any) -> str:
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{key.rpartition('.')[2]} {shown}"


def _arm_name(setting: str, lr: float, lrs_differ: bool, records: Sequence[RunRecord]) -> str:
    if len(records) == 1:
        return records[0].name
    return f"{setting}, LR {lr:.3g}" if lrs_differ else setting


def _refuse_doubles(arms: Iterable[Sequence[RunRecord]]) -> None:
    problems = []
    for runs in arms:
        by_seed: dict[int, RunRecord] = {}
        for run in runs:
            first = by_seed.setdefault(run.seed, run)
            if first is not run:
                problems.append(
                    Problem(
                        f"two runs have the same settings and seed {run.seed}",
                        f"{first.folder} and {run.folder}",
                        fix="name one of them",
                    )
                )
    if problems:
        raise ConfigError(*problems)
