"""What the log says about one trial, row by row, and what else is known of its run: all that the rules look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lora_trainer.config.load import load_config
from lora_trainer.config.places import CONFIG_FILE, METRICS_FILE, PLAN_FILE
from lora_trainer.config.schema import RunConfig
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.statistics.paired import PairedMean, paired_rise
from lora_trainer.planning.run_plan import RunPlan
from lora_trainer.tracking.metrics import HELD_OUT, PRIOR, TRAIN, parse_row

JUMP_RATIO, JUMP_SHARE, JUMP_SUDDEN = 1.5, 0.05, 3.0
"""A restart lifts the LR by this factor in one update, a milestone drops it by as much; and by this share of the peak,
so that the last steps towards 0 count as none; and by so many times the change before it: a steep curve is no jump."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Length and settings of one trial's run."""

    num_steps: int
    steps_per_epoch: int
    final_multiplier: float  # LR of the last update as a share of the highest: what the schedule has in store
    config: RunConfig

    @classmethod
    def of(cls, plan: RunPlan, config: RunConfig) -> RunFacts:
        """Those of a planned run; its first group of weights stands for all."""
        final = share_of_peak(plan.param_groups[0].lr_end, plan.param_groups[0].lr_peak)
        return cls(plan.num_steps, plan.steps_per_epoch, final, config)


def share_of_peak(lr: float, peak: float) -> float:
    """Without the last digits, so that a decay to just a twentieth is one on every processor."""
    return round(float(lr / peak), 9) if peak > 0 else 0.0


@dataclass(frozen=True)
class LRHistory:
    """LR of each completed update, of the first group of weights; `lrs[s - 1]` led to step s."""

    lrs: np.ndarray

    @cached_property
    def warmup_end(self) -> int:
        """Completed updates when the first rise is over; all of them while the LR has only risen so far."""
        stops = np.flatnonzero(np.diff(self.lrs) <= 0)
        return int(stops[0]) if len(stops) else len(self.lrs)

    @property
    def is_warming_up(self) -> bool:
        return self.warmup_end == len(self.lrs)

    @property
    def multiplier(self) -> float:
        """The newest LR as a share of the highest so far."""
        return share_of_peak(self.lrs[-1], self.lrs.max()) if len(self.lrs) else 0.0

    @cached_property
    def restarts(self) -> list[int]:
        """Completed updates at each restart: the next update had a much higher LR."""
        return self._jumps(np.diff(self.lrs), self.lrs[:-1])

    @cached_property
    def drops(self) -> list[int]:
        """Completed updates at each sudden drop: the next update had a much lower LR."""
        return self._jumps(-np.diff(self.lrs), self.lrs[1:])

    def _jumps(self, changes: np.ndarray, low: np.ndarray) -> list[int]:
        """Where the LR changes by much more than it is: `changes` between neighbours, `low` the lower of the two."""
        if not len(changes):
            return []
        before = np.concatenate([[0.0], changes[:-1].clip(0)])
        large = changes > np.maximum.reduce([(JUMP_RATIO - 1) * low, JUMP_SUDDEN * before])
        large &= changes > JUMP_SHARE * self.lrs.max()
        return [int(index) + 1 for index in np.flatnonzero(large) if index + 1 > self.warmup_end]

    @property
    def smooth_since(self) -> int:
        """The step from which on probes may be compared: after the warm-up and after the last jump."""
        return max([self.warmup_end, *self.restarts, *self.drops])


@dataclass
class ProbeLog:
    """The K measurements of one probe: N images, their losses relative to the frozen base (1 is the base's mean)."""

    steps: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # mean loss in absolute units

    def add(self, event: Mapping[str, Any]) -> None:
        self.steps.append(int(event["step"]))
        self.rows.append(np.asarray([float(value) for value in event["items"]]))
        self.losses.append(float(event["loss"]))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def means(self) -> np.ndarray:
        """Mean relative loss of each measurement."""
        return np.asarray([row.mean() for row in self.rows])

    @property
    def gain(self) -> float:
        """The best gain over the base so far: 0.03 is three percent of the base's loss."""
        return float(1 - self.means.min())

    def change(self, before: int, after: int) -> PairedMean:
        """By how much the loss rose from one measurement to another, by index; paired over the images."""
        return paired_rise(self.rows[before], self.rows[after])

    def every_image_rose(self, before: int, after: int, by: float = 0.0) -> bool:
        """Whether each image's loss is higher, by this share of itself: clear even where two images give no SE."""
        return bool((self.rows[after] > (1 + by) * self.rows[before]).all())

    def at_or_after(self, step: int) -> list[int]:
        """Indices of the measurements from a step on."""
        return [index for index, measured in enumerate(self.steps) if measured >= step]

    def drop(self, step: int) -> None:
        """Forget the measurement at this step, if there is one."""
        if self.steps and self.steps[-1] == step:
            del self.steps[-1], self.rows[-1], self.losses[-1]


@dataclass(frozen=True, slots=True)
class ForkResult:
    """The held-out images' losses after a short branch from `step` with another LR (`fork` and `cooldown` events)."""

    step: int
    factor: float  # on the LR; a cooldown ends at 0
    items_N: np.ndarray


class TrialLog:
    """The rows of a `metrics.jsonl` in their order. Fields that tell time or memory are not looked at.

    A file holds one trial, whatever its rows call it: a run may have been renamed on its way.
    """

    def __init__(self) -> None:
        self.lrs: list[float] = []
        self.clipped: list[bool] = []
        self.grad_norms: list[float] = []
        self.ratios: list[tuple[int, float]] = []  # (step, training loss over the base's on the same batch)
        self.skips: list[Mapping[str, Any]] = []  # the `skip` events
        self.failure: str | None = None  # why the trial was ended; None again where a changed setting led on
        self.held_out, self.train, self.prior = ProbeLog(), ProbeLog(), ProbeLog()
        self.probes = {HELD_OUT: self.held_out, TRAIN: self.train, PRIOR: self.prior}
        self.non_finite_probes: list[tuple[int, str]] = []  # (step, probe): the step is left out of all probes
        self.forks: list[ForkResult] = []
        self.cooldowns: list[ForkResult] = []
        self.verdict: tuple[str, ...] = ()  # the states of the last `diagnosis` event
        self.early_reported = False
        self.num_damaged = 0  # lines that hold no row
        self._num_read = 0  # bytes of the file

    @property
    def step(self) -> int:
        """Updates so far, the skipped ones too."""
        return max(len(self.lrs), self.skips[-1]["step"] if self.skips else 0)

    @property
    def learned_probes(self) -> list[ProbeLog]:
        """The held-out probe, then that of the training images where it was measured as often."""
        return [probe for probe in (self.held_out, self.train) if len(probe) == len(self.held_out)]

    def lr_history(self) -> LRHistory:
        return LRHistory(np.asarray(self.lrs))

    def catch_up(self, metrics: Path) -> None:
        """Take in the rows that a file has more than before, but for a last line that is not whole yet."""
        with metrics.open("rb") as file:
            file.seek(self._num_read)
            for line in file:
                if line.endswith(b"\n"):
                    self.add(parse_row(line))
                    self._num_read += len(line)

    def add(self, row: Mapping[str, Any] | None) -> None:
        """Take in one row; None is a damaged line. Events that say nothing about health are passed over."""
        if row is None:
            self.num_damaged += 1
            return
        match row.get("event"):
            case None:
                self._add_update(row)
            case "validation":
                self._add_probe(row)
            case "skip":
                self.skips.append(row)
            case "failed":
                self.failure = f"{row['reason']} (step {row['step']})"
            case "fork" | "cooldown" as event:
                results = self.forks if event == "fork" else self.cooldowns
                items_N = np.asarray(row["items"], dtype=float)
                results.append(ForkResult(int(row["step"]), float(row.get("factor", 0)), items_N))
            case "diagnosis":
                self.verdict = tuple(finding["state"] for finding in row["findings"])
            case "early_report":
                self.early_reported = True

    def _add_probe(self, row: Mapping[str, Any]) -> None:
        """All probes of a step count or none does, so that their measurements stay side by side."""
        step = int(row["step"])
        if not np.isfinite([float(value) for value in row["items"]]).all():
            self.non_finite_probes.append((step, row["probe"]))
            for probe in self.probes.values():
                probe.drop(step)
        elif all(step != broken for broken, _ in self.non_finite_probes):
            self.probes.setdefault(row["probe"], ProbeLog()).add(row)

    def _add_update(self, row: Mapping[str, Any]) -> None:
        self.failure = None
        missing = int(row["step"]) - 1 - len(self.lrs)  # rows of skipped updates, or lost with a damaged log
        self.lrs += [float(row["lr"])] * (max(0, missing) + 1)
        self.clipped.append(bool(row["clipped"]))
        self.grad_norms.append(float(row["grad_norm"]))
        if "ratio" in row:
            self.ratios.append((int(row["step"]), float(row["ratio"])))


def read_run(run_dir: Path) -> tuple[TrialLog, RunFacts]:
    """The log and the facts of a stored run, finished or not.

    Raises:
        ConfigError: the folder holds no run; all missing files are named.
    """
    missing = [name for name in (METRICS_FILE, PLAN_FILE, CONFIG_FILE) if not (run_dir / name).is_file()]
    if missing:
        fix = "give the folder that `lora-trainer train` wrote: <output_dir>/<name>"
        raise ConfigError(*(Problem(f"there is no {name}", str(run_dir), fix=fix) for name in missing))
    log = TrialLog()
    log.catch_up(run_dir / METRICS_FILE)
    plan = RunPlan.from_json(json.loads((run_dir / PLAN_FILE).read_text(encoding="utf-8")))
    return log, RunFacts.of(plan, load_config(run_dir / CONFIG_FILE))
