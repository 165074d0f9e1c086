"""What a run left in its directory, read for a report: the log, the plan, the settings, the samples. Never torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lora_trainer.config.places import CONFIG_FILE, ENVIRONMENT_FILE, EXIT_FILE, METRICS_FILE, PLAN_FILE, SAMPLES
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.verdict import Purpose
from lora_trainer.tracking.metrics import HELD_OUT, probe_fault, read_lines

SAMPLE_FILE = re.compile(r"step-(\d{8})-(\d+)\.png")
SWEEP_FILE = "sweep.json"
Row = dict[str, Any]


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
    def num_updates(self) -> int:
        """As planned."""
        return int(self.plan["num_updates"])

    @property
    def step(self) -> int:
        """Updates done, the skipped ones too: those leave an event in place of a row."""
        return max((row["step"] for row in (*self.updates[-1:], *self.events_of("skip"))), default=0)

    @property
    def is_finished(self) -> bool:
        return self.step >= self.num_updates

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
        return "finished" if self.is_finished else f"unfinished: step {self.step} of {self.num_updates}"

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
            prompts=_prompts(folder / CONFIG_FILE),
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
        left_out = sorted({(trial["setting"], trial["peak_lr"]) for trial in _not_begun(trials)})
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
    idle = [trial for sweep in sweeps for trial in _not_begun(sweep.get("trials", ()))]
    return [f"{trial['name']} was not trained: {trial['reason']}" for trial in idle]


def _not_begun(trials: Sequence[Row]) -> list[Row]:
    return [trial for trial in trials if trial["status"] == "stopped" and not trial["step"]]


def read_runs(folders: Sequence[Path], purpose: Purpose = "selection") -> list[RunRecord]:
    """Read several run directories and sweeps.

    Raises:
        ConfigError: as `read_run`, and where no trial of a sweep has begun; for all that cannot be read together.
    """
    records: list[RunRecord] = []
    problems: list[Problem] = []
    for folder in folders:
        try:
            trials = _read_sweep(folder) if (folder / SWEEP_FILE).is_file() else [read_run(folder)]
            records += [replace(trial, purpose=purpose, source=folder.resolve().name) for trial in trials]
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return records


def _read_json(file: Path) -> Row:
    return json.loads(file.read_text()) if file.is_file() else {}


def _prompts(config: Path) -> tuple[str, ...]:
    settings = YAML(typ="safe").load(config) if config.is_file() else {"sample": {"prompts": ()}}
    return tuple(prompt["prompt"] for prompt in settings["sample"]["prompts"])


def sample_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The pictures of a run by (step, number of the prompt from 1)."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {(int(m[1]), int(m[2])): file for file in files if (m := SAMPLE_FILE.fullmatch(file.name))}
