"""What a rule answers: a state that was found, that was not, or that could not be judged; and what may be tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

Confidence = Literal["low", "medium", "high"]
Status = Literal["found", "not found", "not measured"]
Number = int | float


class State(StrEnum):
    """What a run can be in; several at once."""

    NON_FINITE = "non-finite"
    DIVERGED = "diverged"
    OSCILLATING = "oscillating"
    RESTART_SHOCK = "restart-shock"
    OVERFIT = "overfit"
    FORGETTING = "forgetting"
    NEVER_STARTED = "never-started"
    STAGNANT = "stagnant"
    LR_NOISE_LIMITED = "lr-noise-limited"
    CLIPPING = "clipping"
    FINISHED_DECAYING = "finished-decaying"
    HEALTHY = "healthy"

    @property
    def is_fault(self) -> bool:
        """Whether something should be changed; the other two states are good news."""
        return self not in (State.FINISHED_DECAYING, State.HEALTHY)

    def found(self, confidence: Confidence, evidence: str, **numbers: Number) -> Finding:
        return Finding(self, "found", confidence, evidence, numbers)

    def not_found(self, evidence: str, **numbers: Number) -> Finding:
        return Finding(self, "not found", None, evidence, numbers)

    def found_where(self, holds: bool, confidence: Confidence, evidence: str, **numbers: Number) -> Finding:
        """Found with this confidence where a rule holds, else not found; on the same evidence."""
        return self.found(confidence, evidence, **numbers) if holds else self.not_found(evidence, **numbers)

    def not_measured(self, missing: str) -> Finding:
        return Finding(self, "not measured", None, missing)


@dataclass(frozen=True, slots=True)
class Advice:
    """One change to try, as a setting where it is one."""

    text: str
    key: str | None = None
    value: Any = None

    @property
    def override(self) -> str | None:
        """The change as a word for the command line."""
        return None if self.key is None else f"{self.key}={_as_yaml(self.value)}"

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text} if self.key is None else asdict(self)


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "null" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule's answer about one state."""

    state: State
    status: Status
    confidence: Confidence | None
    evidence: str  # in words and numbers, with steps; for `not measured`, what was missing
    numbers: dict[str, Number] = field(default_factory=dict)
    advice: tuple[Advice, ...] = ()

    def as_json(self) -> dict[str, Any]:
        numbers = {key: round(value, 6) for key, value in self.numbers.items()}
        return asdict(self) | {"numbers": numbers, "advice": [advice.as_json() for advice in self.advice]}


def confidence_of(*margins: float) -> Confidence:
    """High where every number is at least twice its threshold, low where one barely reaches it (under 1.3)."""
    least = min(margins)
    return "high" if least >= 2 else "medium" if least >= 1.3 else "low"
