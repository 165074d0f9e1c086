"""What runs left in their directories, and how they are sorted into arms that can be compared. Never imports torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lora_trainer.config.places import CONFIG_FILE, ENVIRONMENT_FILE, EXIT_FILE, METRICS_FILE, PLAN_FILE, SAMPLES
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.verdict import Arm, Purpose
from lora_trainer.tracking.metrics import HELD_OUT, probe_fault, read_lines

SAMPLE_FILE = re.compile(r"step-(\d{8})-(\d+)\.png")
SWEEP_FILE = "sweep.json"
Row = dict[str, Any]
MUST_AGREE = ("base content", "data content", "validation content", "validation.seed", "data.resolution")
"""Without these equal, held-out losses do not measure the same thing."""
_LR = "optimizer.lr"
_NO_SETTING = ("seed", "train.threads", "num_processes", "train.gradient_checkpointing", *MUST_AGREE)
_SCHEDULE, _SCHEDULE_TYPE = "lr_scheduler.", "lr_scheduler.type"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One trial's run. What was not recorded is empty."""

    name: str
    folder: Path
    plan: Row
    environment: Row
    exit: Row
    updates: tuple[Row, ...]  # applied updates
    events: tuple[Row, ...]
    num_damaged: int  # lines of the log that hold no row; they are left out
    prompts: tuple[str, ...]
    samples: dict[tuple[int, int], Path]  # as `sample_files` reads them
    arm: str | None = None  # the trial's name in a sweep, without its seed
    setting: str | None = None  # the same without its LR
    lrs_tried: tuple[float, ...] = ()  # peak LRs of its setting that a sweep left out before their runs
    source: str = ""  # name of the folder that was asked for: the run's, or its sweep's
    place: str = ""  # of that folder, from where its commands are typed
    purpose: Purpose = "selection"

    @property
    def identity(self) -> dict[str, Any]:
        """Every setting and content that decides what is learned."""
        return self.plan["identity"]

    @property
    def seed(self) -> int:
        return int(self.identity["seed"])

    @property
    def peak_lr(self) -> float:
        return float(self.identity["optimizer.lr"])

    @property
    def num_steps(self) -> int:
        """As planned."""
        return int(self.plan["num_updates"])

    @property
    def step(self) -> int:
        """Updates done, the skipped ones too: those leave an event in place of a row."""
        return max((row["step"] for row in (*self.updates[-1:], *self.events_of("skip"))), default=0)

    @property
    def is_finished(self) -> bool:
        return self.step >= self.num_steps

    @property
    def ending(self) -> Row | None:
        """The event that ended this trial before its last update: `failed`, or `stopped` by a rule of its sweep.

        One that a changed setting led on from is none.
        """
        endings = self.events_of("failed", "stopped")
        return endings[-1] if endings and endings[-1]["step"] >= self.step else None

    @property
    def failure(self) -> str | None:
        """Why the run has no result and counts against its arm; None while it may still get one."""
        if self.ending is not None:
            return str(self.ending["reason"])
        if self.exit.get("status") == "numeric stop":
            return str(self.exit.get("message", "numbers were not finite"))
        return None if self.final is None else probe_fault(self.final)

    @property
    def status(self) -> str:
        if self.failure is not None:
            how = "failed" if self.ending is None else self.ending["event"]
            return f"{how} at step {self.step}: {self.failure}"
        return "finished" if self.is_finished else f"unfinished: step {self.step} of {self.num_steps}"

    def events_of(self, *kinds: str) -> list[Row]:
        return [row for row in self.events if row["event"] in kinds]

    def probe(self, name: str = HELD_OUT) -> list[Row]:
        """The readings of one probe, the one before the first update first."""
        return [row for row in self.events_of("validation") if row["probe"] == name]

    @property
    def final(self) -> Row | None:
        """The held-out reading after the last update done, where there is one."""
        readings = self.probe()
        return readings[-1] if readings and readings[-1]["step"] == self.step and self.step else None

    @property
    def best(self) -> Row | None:
        """The smallest held-out reading."""
        readings = [row for row in self.probe() if probe_fault(row) is None]
        return min(readings, key=lambda row: row["relative"], default=None)

    @property
    def training_s(self) -> float:
        """Seconds spent in updates; probes, samples and saves are not in it."""
        speeds = [row["images_per_s"] for row in self.updates]  # rounded in the log: the slowest may read 0
        return sum(self.plan["global_batch"] / speed for speed in speeds if speed)

    @property
    def peak_memory_gib(self) -> float | None:
        return max((row["peak_memory_gib"] for row in self.updates), default=None)


def read_run(folder: Path) -> RunRecord:
    """Read one run directory, also while the run goes on.

    Raises:
        ConfigError: it is none, or what is in it cannot be read.
    """
    if not (folder / PLAN_FILE).is_file() or not (folder / METRICS_FILE).is_file():
        what = f"this is no run directory: it lacks {PLAN_FILE} or {METRICS_FILE}"
        fix = "name folders that `lora-trainer train` or `lora-trainer sweep` wrote"
        raise ConfigError(Problem(what, str(folder), fix=fix))
    try:
        lines = list(read_lines(folder / METRICS_FILE))
        rows = [row for row in lines if row is not None]
        return RunRecord(
            name=folder.resolve().name,
            folder=folder,
            plan=_read_json(folder / PLAN_FILE),
            environment=_read_json(folder / ENVIRONMENT_FILE),
            exit=_read_json(folder / EXIT_FILE),
            updates=tuple(row for row in rows if "event" not in row),
            events=tuple(row for row in rows if "event" in row),
            num_damaged=len(lines) - len(rows),
            prompts=tuple(each["prompt"] for each in _settings(folder).get("sample", {}).get("prompts", ())),
            samples=sample_files(folder / SAMPLES),
        )
    except (ValueError, OSError) as error:
        raise ConfigError(Problem("this run directory cannot be read", str(folder), str(error))) from error


def _read_sweep(folder: Path) -> list[RunRecord]:
    """Read the trials of a sweep that have begun, with their names in `sweep.json` (docs/sweeps.md).

    Raises:
        ConfigError: nothing has begun, or something cannot be read.
    """
    try:
        trials = _read_json(folder / SWEEP_FILE)["trials"]
        left_out = sorted({(trial["setting"], trial["peak_lr"]) for trial in trials if is_left_out(trial)})
        records = []
        for trial in trials:
            if (folder / trial["folder"] / METRICS_FILE).is_file():
                names = {key: trial[key] for key in ("name", "arm", "setting")}
                lrs_tried = tuple(lr for setting, lr in left_out if setting == trial["setting"])
                records.append(replace(read_run(folder / trial["folder"]), **names, lrs_tried=lrs_tried))
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(Problem("this sweep cannot be read", str(folder), str(error))) from error
    if not records:
        raise ConfigError(Problem("no trial of this sweep has begun", str(folder), fix="start it, then ask again"))
    return records


def not_begun(folders: Sequence[Path]) -> list[str]:
    """The trials of sweeps that were decided not to be begun, with the reason; from what `read_runs` could read."""
    sweeps = [_read_json(folder / SWEEP_FILE) for folder in folders]
    idle = [trial for sweep in sweeps for trial in sweep.get("trials", ()) if is_left_out(trial)]
    return [f"{trial['name']} was not trained: {trial['reason']}" for trial in idle]


def is_left_out(trial: Row) -> bool:
    """Whether a rule of its sweep decided not to begin this trial."""
    return trial["status"] == "stopped" and not trial["step"]


def read_runs(folders: Sequence[Path], purpose: Purpose = "selection") -> list[RunRecord]:
    """Read several run directories and sweeps.

    Raises:
        ConfigError: as `read_run`, and where no trial of a sweep has begun; for all that cannot be read together.
    """
    records, problems = list[RunRecord](), list[Problem]()
    for folder in folders:
        try:
            trials = _read_sweep(folder) if (folder / SWEEP_FILE).is_file() else [read_run(folder)]
            source, place = folder.resolve().name, _place(folder.resolve())
            records += [replace(trial, purpose=purpose, source=source, place=place) for trial in trials]
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return records


def _read_json(file: Path) -> Row:
    return json.loads(file.read_text()) if file.is_file() else {}


def _place(folder: Path) -> str:
    """Where a run or sweep lies seen from where it was started; its name alone where its place is absolute."""
    output_dir = str(_settings(folder).get("output_dir", ""))
    return folder.name if Path(output_dir).expanduser().is_absolute() else str(Path(output_dir) / folder.name)


def _settings(folder: Path) -> Row:
    config = folder / CONFIG_FILE
    return YAML(typ="safe").load(config) if config.is_file() else {}


def sample_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The pictures of a run by (step, number of the prompt from 1)."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {(int(m[1]), int(m[2])): file for file in files if (m := SAMPLE_FILE.fullmatch(file.name))}


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

        None where no run has this purpose.
        """
        runs = [run for run in self.runs if run.purpose == purpose]
        if not runs:
            return None
        failed = {run.seed: run.failure for run in runs if run.failure is not None}
        finals = {run.seed: run.final for run in runs if run.is_finished and run.seed not in failed}
        losses = {seed: float(final["relative"]) for seed, final in finals.items() if final is not None}
        lr_budget = float(runs[0].plan["lr_groups"][0]["lr_budget"])
        return Arm(self.name, self.setting, self.peak_lr, lr_budget, losses, failed, runs[0].lrs_tried)


def named_runs(arms: Sequence[ArmRuns]) -> list[tuple[str, RunRecord]]:
    """All runs, each with its arm's name, and with the seed where the arm has several."""
    return [(f"{g.name}, seed {run.seed}" if len(g.runs) > 1 else g.name, run) for g in arms for run in g.runs]


def varied(records: Sequence[RunRecord]) -> list[str]:
    """The settings that are not equal in all runs; the seed and what only places the work are none."""
    keys = sorted({key for record in records for key in record.identity if not key.startswith("validation.")})
    return [key for key in keys if key not in _NO_SETTING and _differs(records, key)]


def arms(records: Sequence[RunRecord]) -> list[ArmRuns]:
    """Sort runs into arms, in the order of the runs: by the names that a sweep gave, else by what was varied.

    Raises:
        ConfigError: two runs are of one setting and one seed.
    """
    swept = all(record.arm is not None for record in records)
    names = [(str(record.arm), str(record.setting)) for record in records] if swept else _names(records)
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
    if used := ", ".join(map(str, sorted(chosen & fresh))):
        what = f"seed {used} took part in choosing, so it cannot confirm"
        raise ConfigError(Problem(what, "--confirm", fix="train the leaders with other seeds"))


def pairing_notes(arms: Sequence[ArmRuns]) -> list[str]:
    """Seeds whose runs did not see the same images, timesteps and noise, by the digests in the log."""
    draws_by_seed: dict[int, list[dict[int, str]]] = {}
    for _, run in named_runs(arms):
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
    known = [key for key in keys if not key.startswith(_SCHEDULE) or record.identity.get(key) is not None]
    return ", ".join([schedule, *(_setting(record, key) for key in known if key != _SCHEDULE_TYPE)])


def _setting(record: RunRecord, key: str) -> str:
    value = record.identity.get(key)
    return f"{key.rpartition('.')[2]} {f'{value:g}' if isinstance(value, float) else value}"
