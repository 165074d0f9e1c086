"""What the log says about one trial, gathered row by row: all that the rules look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_trainer.data.holdout import HELD_OUT, PRIOR, TRAIN
from lora_trainer.evidence.diagnosis.lr_history import LRHistory


@dataclass(frozen=True, slots=True)
class Change:
    """A mean difference, paired over the probe's images, and its standard error."""

    mean: float
    se: float

    @property
    def z(self) -> float:
        """The difference in standard errors; 0 where nothing moved."""
        if self.mean == 0:
            return 0.0
        return self.mean / self.se if self.se > 0 else float(np.copysign(np.inf, self.mean))


def paired(before_N: np.ndarray, after_N: np.ndarray) -> Change:
    """How much the images' losses rose; the SE is over images, and infinite for a single one."""
    difference_N = after_N - before_N
    num = len(difference_N)
    se = float(difference_N.std(ddof=1)) / num**0.5 if num > 1 else float("inf")
    return Change(float(difference_N.mean()), se)


@dataclass
class ProbeLog:
    """The K measurements of one probe: N images, their losses relative to the frozen base (1 is the base's mean)."""

    steps: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Mean loss in absolute units."""

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

    def change(self, before: int, after: int) -> Change:
        """From one measurement to another, by index."""
        return paired(self.rows[before], self.rows[after])

    def all_above(self, index: int, rise: float) -> bool:
        """Whether every image's loss is above its first by this share: clear even where two images give no SE."""
        return bool((self.rows[index] > (1 + rise) * self.rows[0]).all())

    def at_or_after(self, step: int) -> list[int]:
        """Indices of the measurements from a step on."""
        return [index for index, own in enumerate(self.steps) if own >= step]

    def drop(self, step: int) -> None:
        """Forget the measurement at this step, if there is one."""
        if self.steps and self.steps[-1] == step:
            del self.steps[-1], self.rows[-1], self.losses[-1]


@dataclass(frozen=True, slots=True)
class Skip:
    """An update that was not applied."""

    step: int
    reason: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fork:
    """The held-out images' losses after a short branch from `step` with another LR (`fork` and `cooldown` events)."""

    step: int
    updates: int
    factor: float
    """On the LR; a cooldown ends at 0."""
    items_N: np.ndarray


class TrialLog:
    """One trial's rows and events, in the order of the file. Fields that tell time or memory are not looked at."""

    def __init__(self, trial: str) -> None:
        self.trial = trial
        self.lrs: list[float] = []
        self.clipped: list[bool] = []
        self.grad_norms: list[float] = []
        self.ratios: list[tuple[int, float]] = []
        """(step, training loss relative to the frozen base on the same batch), where it was measured."""
        self.skips: list[Skip] = []
        self.failure: str | None = None
        """Why the trial was ended; None again where a changed setting led on."""
        self.probes: dict[str, ProbeLog] = {HELD_OUT: ProbeLog(), TRAIN: ProbeLog(), PRIOR: ProbeLog()}
        self.non_finite_probes: list[tuple[int, str]] = []
        """(step, probe) of measurements that were not finite; their steps are left out of all probes."""
        self.forks: list[Fork] = []
        self.cooldowns: list[Fork] = []
        self.verdict: tuple[str, ...] = ()
        """The states of the last `diagnosis` event."""
        self.early_reported = False

    @property
    def step(self) -> int:
        """Updates so far, the skipped ones too."""
        return max(len(self.lrs), self.skips[-1].step if self.skips else 0)

    @property
    def held_out(self) -> ProbeLog:
        return self.probes[HELD_OUT]

    @property
    def train(self) -> ProbeLog:
        return self.probes[TRAIN]

    @property
    def prior(self) -> ProbeLog:
        return self.probes[PRIOR]

    def lr_history(self) -> LRHistory:
        return LRHistory(np.asarray(self.lrs))

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one row of the file; events that say nothing about health are passed over."""
        match row.get("event"):
            case None:
                self._add_update(row)
            case "validation":
                self._add_probe(row)
            case "skip":
                self.skips.append(Skip(row["step"], row["reason"], tuple(row["files"])))
            case "failed":
                self.failure = f"{row['reason']} (step {row['step']})"
            case "fork":
                self.forks.append(_fork(row, float(row["factor"])))
            case "cooldown":
                self.cooldowns.append(_fork(row, 0.0))
            case "diagnosis":
                self.verdict = tuple(found["state"] for found in row["findings"])
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


def _fork(row: Mapping[str, Any], factor: float) -> Fork:
    return Fork(int(row["step"]), int(row["updates"]), factor, np.asarray(row["items"], dtype=float))


class RunLog:
    """All trials of a `metrics.jsonl`."""

    def __init__(self, trials: Sequence[str] = ()) -> None:
        self.trials = {name: TrialLog(name) for name in trials}
        self.num_damaged = 0
        self._shared: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any] | None) -> None:
        """Take in one row; one without a trial (a skipped update) concerns them all, those to come too.

        Args:
            row: None is a damaged line, which is counted.
        """
        if row is None:
            self.num_damaged += 1
            return
        name = row.get("trial")
        if row.get("event") == "renamed":
            self._rename(row["before"], row["trial"])
            return
        if name is None:
            self._shared.append(row)
            for trial in self.trials.values():
                trial.add(row)
            return
        if name not in self.trials:
            self._begin(name)
        self.trials[name].add(row)

    def _rename(self, before: str, name: str) -> None:
        """The rows so far were of a trial that has another name from here on."""
        if before in self.trials:
            own = self.trials.pop(before)
            own.trial = name
            self.trials[name] = own

    def expect(self, name: str) -> None:
        """Where no row named a trial yet, there is one, of this name."""
        if not self.trials:
            self._begin(name)

    def _begin(self, name: str) -> None:
        self.trials[name] = TrialLog(name)
        for shared in self._shared:
            self.trials[name].add(shared)
