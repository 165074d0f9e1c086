"""All rules on one trial's log, and what they amount to: of a stored run or of one that goes on; the early report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_trainer.evidence.diagnosis import rules
from lora_trainer.evidence.diagnosis.findings import Finding, State, advise
from lora_trainer.evidence.diagnosis.log import RunFacts, TrialLog
from lora_trainer.evidence.diagnosis.rules import Thresholds
from lora_trainer.evidence.statistics.paired import ROUNDING
from lora_trainer.tracking.metrics import parse_row

EARLY_SHARE = 0.1
CHANGES_FOR_SCATTER, CHANGES_FOR_CORRELATION = 4, 3
RULES: dict[State, Callable[[TrialLog, RunFacts, Thresholds], Finding]] = {
    State.NON_FINITE: rules.non_finite,
    State.DIVERGED: rules.diverged,
    State.OSCILLATING: rules.oscillating,
    State.RESTART_SHOCK: rules.restart_shock,
    State.OVERFIT: rules.overfit,
    State.FORGETTING: rules.forgetting,
    State.NEVER_STARTED: rules.never_started,
    State.STAGNANT: rules.stagnant,
    State.LR_NOISE_LIMITED: rules.lr_noise_limited,
    State.CLIPPING: rules.clipping,
    State.FINISHED_DECAYING: rules.finished_decaying,
}
"""The gravest first."""
EXPLAINED_BY: dict[State, tuple[State, ...]] = {
    State.NEVER_STARTED: (State.NON_FINITE, State.DIVERGED, State.OVERFIT, State.OSCILLATING),
    State.STAGNANT: (State.NON_FINITE, State.DIVERGED, State.OVERFIT, State.OSCILLATING, State.NEVER_STARTED),
    State.FINISHED_DECAYING: (State.NON_FINITE, State.DIVERGED, State.OVERFIT, State.NEVER_STARTED),
    State.OVERFIT: (State.DIVERGED, State.OSCILLATING),
    State.OSCILLATING: (State.DIVERGED,),
    State.RESTART_SHOCK: (State.DIVERGED, State.OSCILLATING),
    State.LR_NOISE_LIMITED: (State.DIVERGED, State.OSCILLATING),
}
"""A state is not told beside one that explains it: a diverged run's flat loss is no stagnation."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The answers of all rules on one trial at one step."""

    trial: str
    step: int
    findings: tuple[Finding, ...]

    @property
    def found(self) -> tuple[Finding, ...]:
        """The gravest first; `healthy` stands where no fault does."""
        return tuple(finding for finding in self.findings if finding.status == "found")

    @property
    def faults(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.found if finding.state.is_fault)

    @property
    def verdict(self) -> tuple[str, ...]:
        """The names of the states found."""
        return tuple(str(finding.state) for finding in self.found)

    def of(self, state: State) -> Finding:
        return next(finding for finding in self.findings if finding.state is state)

    def as_json(self) -> dict[str, Any]:
        findings = [finding.as_json() for finding in self.findings]
        return {"trial": self.trial, "step": self.step, "verdict": list(self.verdict), "findings": findings}


def diagnose(log: TrialLog, run: RunFacts, limits: Thresholds | None = None) -> Diagnosis:
    """Judge a trial by its log so far; nothing else is looked at, so that the same log gives the same answer."""
    limits = limits or Thresholds()
    answers = {state: rule(log, run, limits) for state, rule in RULES.items()}
    for state, causes in EXPLAINED_BY.items():
        causing = [cause for cause in causes if answers[cause].status == "found"]
        if answers[state].status == "found" and causing:
            answers[state] = state.not_found(f"explained by {causing[0]}: {answers[state].evidence}")
    answers[State.HEALTHY] = _healthy(log, list(answers.values()))
    findings = tuple(replace(answer, advice=advise(answer, log, run)) for answer in answers.values())
    return Diagnosis(run.config.name, log.step, findings)


def _healthy(log: TrialLog, answers: list[Finding]) -> Finding:
    """No fault in what was measured; the confidence says how much that was."""
    if faults := [answer.state for answer in answers if answer.status == "found" and answer.state.is_fault]:
        return State.HEALTHY.not_found(f"found: {', '.join(faults)}")
    probe = log.held_out
    if len(probe) < 3:
        return State.HEALTHY.found("low", f"no fault in {log.step} updates, but {len(probe)} probes say little")
    losses = f"held-out loss {probe.means[-1]:.4f} of the base's, best {probe.means.min():.4f}"
    evidence = f"no fault found by step {log.step}; {losses}"
    return State.HEALTHY.found("high" if len(probe) >= 6 else "medium", evidence, gain=probe.gain)


@dataclass(frozen=True, slots=True)
class EarlyReport:
    """Is it learning, evenly, and does it carry over? Three numbers and their precision; None is not measured."""

    step: int
    gain: float  # of the held-out loss over the base's
    gain_per_update: float
    gain_per_update_se: float  # over the probe's images: the precision of this run
    instability: float | None  # scatter of the changes between probes as a share of the gain; needs five probes
    train_gain: float | None
    correlation: float | None  # of the changes of the training and the held-out probe; needs four probes

    def as_event(self) -> dict[str, Any]:
        numbers = {key: value for key, value in asdict(self).items() if key != "step"}
        return {key: None if value is None else round(value, 9) for key, value in numbers.items()}

    @property
    def sentences(self) -> list[str]:
        """For people."""
        per, se = 100 * self.gain_per_update, 100 * self.gain_per_update_se
        sure = "" if abs(self.gain_per_update) > 2 * self.gain_per_update_se else ": not clear of 0 yet"
        learning = f"held-out loss gains {per:+z.4f} +- {se:.4f} % of the base's per update{sure}"
        steady = "instability not measured (needs five probes)"
        if self.instability is not None:
            steady = f"changes between probes scatter by {self.instability:.2f} of the gain"
        follows = "whether validation follows training was not measured"
        if self.train_gain is not None and self.train_gain <= ROUNDING:
            follows = f"the training images gained nothing yet ({self.train_gain:+z.4f})"
        elif self.train_gain is not None:
            correlation = "" if self.correlation is None else f", correlation of their changes {self.correlation:.2f}"
            follows = f"validation gains {self.gain / self.train_gain:.0%} of what training gains{correlation}"
        return [learning, steady, follows]


def early_report(log: TrialLog, run: RunFacts) -> EarlyReport | None:
    """What the probes say up to the first one after both an epoch and a tenth of the run; None before that."""
    probe, train = log.held_out, log.train
    late = probe.at_or_after(max(run.updates_per_epoch, math.ceil(EARLY_SHARE * run.num_updates)))
    if not late or late[0] == 0:
        return None
    last = late[0]
    step, rise, means = probe.steps[last], probe.change(0, last), probe.means[: last + 1]
    instability = train_gain = correlation = None
    if last >= CHANGES_FOR_SCATTER and abs(rise.mean) > ROUNDING:
        instability = rules.detrended_scatter(means) / abs(rise.mean)
    if len(train) > last:
        train_gain = -train.change(0, last).mean
        changes = np.diff(train.means[: last + 1]), np.diff(means)
        if last >= CHANGES_FOR_CORRELATION and min(map(np.ptp, changes)) > ROUNDING:
            correlation = float(np.corrcoef(*changes)[0, 1])
    return EarlyReport(step, -rise.mean, -rise.mean / step, rise.se / step, instability, train_gain, correlation)


class Note(NamedTuple):
    """An event for the log and the lines for the console."""

    event: str
    content: dict[str, Any]
    lines: tuple[str, ...]


class LiveDiagnosis:
    """Follows a growing `metrics.jsonl`.

    It reads what the log holds and nothing else, so that a run that was killed and resumed says what any other says.
    """

    def __init__(self, metrics: Path, run: RunFacts) -> None:
        self.log = TrialLog()
        self._metrics, self._run, self._read = metrics, run, 0
        self._catch_up()

    def look(self) -> Iterator[Note]:
        """Read the new rows; what has changed. Each note must be logged before the next look."""
        self._catch_up()
        log, name = self.log, self._run.config.name
        if not log.early_reported and (early := early_report(log, self._run)) is not None:
            line = f"early report of {name} at step {early.step}: {'; '.join(early.sentences)}"
            yield Note("early_report", early.as_event(), (line,))
        diagnosis = diagnose(log, self._run)
        if diagnosis.verdict != (log.verdict or ("healthy",)):  # that all is well goes without saying at first
            lines = [line for finding in diagnosis.found for line in finding_lines(finding)]
            content = {"findings": [finding.as_json() for finding in diagnosis.found]}
            yield Note("diagnosis", content, (f"diagnosis of {name} at step {diagnosis.step}:", *lines))

    def _catch_up(self) -> None:
        with self._metrics.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.log.add(parse_row(line))
                self._read += len(line)


def finding_lines(finding: Finding) -> Iterator[str]:
    """A state that was found, its evidence, and what to try."""
    yield f"  {finding.state} ({finding.confidence} confidence): {finding.evidence}"
    for advice in finding.advice:
        yield f"    try: {advice.text}" + (f"  ->  {advice.override}" if advice.override else "")
