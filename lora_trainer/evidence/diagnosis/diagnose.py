"""All rules on one trial's log, and what they amount to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_trainer.evidence.diagnosis.advice import advise
from lora_trainer.evidence.diagnosis.finding import Finding, State, found, not_found
from lora_trainer.evidence.diagnosis.learning_rules import (
    diverged,
    finished_decaying,
    lr_noise_limited,
    never_started,
    oscillating,
    stagnant,
)
from lora_trainer.evidence.diagnosis.run_facts import RunFacts
from lora_trainer.evidence.diagnosis.thresholds import Thresholds
from lora_trainer.evidence.diagnosis.transfer_rules import forgetting, overfit, restart_shock
from lora_trainer.evidence.diagnosis.trial_log import TrialLog
from lora_trainer.evidence.diagnosis.update_rules import clipping, non_finite

Rule = Callable[[TrialLog, RunFacts, Thresholds], Finding]
RULES: dict[State, Rule] = {
    State.NON_FINITE: non_finite,
    State.DIVERGED: diverged,
    State.OSCILLATING: oscillating,
    State.RESTART_SHOCK: restart_shock,
    State.OVERFIT: overfit,
    State.FORGETTING: forgetting,
    State.NEVER_STARTED: never_started,
    State.STAGNANT: stagnant,
    State.LR_NOISE_LIMITED: lr_noise_limited,
    State.CLIPPING: clipping,
    State.FINISHED_DECAYING: finished_decaying,
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
        return {
            "trial": self.trial,
            "step": self.step,
            "verdict": list(self.verdict),
            "findings": [finding.as_json() for finding in self.findings],
        }


def diagnose(log: TrialLog, run: RunFacts, limits: Thresholds | None = None) -> Diagnosis:
    """Judge a trial by its log so far; nothing else is looked at, so that the same log gives the same answer."""
    limits = limits or Thresholds()
    answers = {state: rule(log, run, limits) for state, rule in RULES.items()}
    for state, causes in EXPLAINED_BY.items():
        causing = [cause for cause in causes if answers[cause].status == "found"]
        if answers[state].status == "found" and causing:
            answers[state] = not_found(state, f"explained by {causing[0]}: {answers[state].evidence}")
    answers[State.HEALTHY] = _healthy(log, list(answers.values()))
    return Diagnosis(
        log.trial, log.step, tuple(answer.with_advice(advise(answer, log, run)) for answer in answers.values())
    )


def _healthy(log: TrialLog, answers: list[Finding]) -> Finding:
    """No fault in what was measured; the confidence says how much that was."""
    faults = [answer.state for answer in answers if answer.status == "found" and answer.state.is_fault]
    if faults:
        return not_found(State.HEALTHY, f"found: {', '.join(faults)}")
    probe = log.held_out
    if len(probe) < 3:
        return found(State.HEALTHY, "low", f"no fault in {log.step} updates, but {len(probe)} probes say little")
    evidence = (
        f"no fault found by step {log.step}; held-out loss {probe.means[-1]:.4f} of the base's, "
        f"best {probe.means.min():.4f}"
    )
    return found(State.HEALTHY, "high" if len(probe) >= 6 else "medium", evidence, gain=probe.gain)
