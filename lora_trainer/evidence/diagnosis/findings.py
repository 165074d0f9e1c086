"""What a rule answers about a state, and where it was found, what to try: suggestions, nothing acts by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from lora_trainer.config.optimizers import Prodigy
from lora_trainer.config.schema import RunConfig
from lora_trainer.evidence.diagnosis.log import RunFacts, TrialLog
from lora_trainer.evidence.statistics.paired import rise_in_se

Confidence = Literal["low", "medium", "high"]
Status = Literal["found", "not found", "not measured"]
Number = int | float
CLEAR_SE = 2.0
SHRINK_THAT_SHOWS = 0.1
HIGHEST_LR = 0.9  # the config refuses 1 and above
FLAT_SCHEDULES = ("constant", "constant_with_warmup")
WITH_PRIOR = "data.sources=[{dir: <your images>}, {dir: <prior images>}], data.dir=null"
UNFIT = "the base may know this already, or the prompt may not name it"


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


def advise(finding: Finding, log: TrialLog, run: RunFacts) -> tuple[Advice, ...]:
    """What to try about a state that was found, the first first."""
    return tuple(_advice(finding, log, run)) if finding.status == "found" else ()


def _advice(finding: Finding, log: TrialLog, run: RunFacts) -> Iterator[Advice]:
    config = run.config
    match finding.state:
        case State.NON_FINITE:
            if files := sorted({file for skip in log.skips for file in skip["files"]}):
                yield Advice(f"look at the images of the skipped updates: {', '.join(files[:8])}")
            if config.train.precision in ("auto", "fp16"):
                yield Advice("rule out the precision: fp32 on a short run", "train.precision", "fp32")
            yield _scaled_lr(config, 0.1, "a tenth of the LR")
        case State.DIVERGED:
            yield _scaled_lr(config, 0.1, "start again with a tenth of the LR")
            yield from _warmup(config)
            yield from _best_before(log)
        case State.OSCILLATING:
            yield _scaled_lr(config, 1 / 3, "a third of the LR")
            yield from _decay(config, "or let the LR decay: the scatter shrinks with it")
            steps = 2 * config.train.gradient_accumulation_steps
            yield Advice("or a larger batch, if the LR must stay", "train.gradient_accumulation_steps", steps)
        case State.RESTART_SHOCK:
            if _follows_a_schedule(config):
                cosine = {"type": "cosine", "warmup_steps": getattr(config.lr_scheduler, "warmup_steps", 0)}
                yield Advice("one decay without restarts", "lr_scheduler", cosine)
            yield _scaled_lr(config, 1 / 3, "or a third of the LR, so that each restart is milder")
        case State.OVERFIT:
            yield from _against_overfitting(int(finding.numbers["best_step"]), log, run)
        case State.FORGETTING:
            yield Advice(f"train on prior images as well (prior preservation): {WITH_PRIOR}")
            yield _scaled_lr(config, 0.5, "or half the LR")
        case State.NEVER_STARTED:
            yield _raised_lr(log, config, 3.0)
            yield Advice("or measure the range first: lora-trainer find-lr")
            yield Advice(f"check that captions and targets fit: {UNFIT}")
        case State.STAGNANT:
            yield _raised_lr(log, config, 2.0)
            yield from _decay(config, "or let the LR decay, which often gains the last part")
            why = "or more room to learn, if a higher LR brings nothing"
            yield Advice(why, "adapter.rank", 2 * config.adapter.rank)
        case State.LR_NOISE_LIMITED if _follows_a_schedule(config):
            shape = {"type": "warmup_stable_decay", "decay_steps": "20%"}
            yield Advice("the LR's own noise is the limit: let it decay to 0 at the end", "lr_scheduler", shape)
        case State.LR_NOISE_LIMITED:
            yield _scaled_lr(config, 1 / 3, "a third of the LR")
        case State.CLIPPING:
            limit = float(f"{2 * finding.numbers['median_grad_norm']:.2g}")
            why = "the clip sets the step, not the LR: raise the limit to twice the median norm"
            yield Advice(why, "train.max_grad_norm", limit)
            yield _scaled_lr(config, 0.5, "or half the LR, if the norms grew while training")


def _against_overfitting(best_step: int, log: TrialLog, run: RunFacts) -> Iterator[Advice]:
    config, total_lr = run.config, math.fsum(log.lrs)
    yield from _best_before(log)
    if best_step > 0:
        epochs = max(1, round(best_step / run.updates_per_epoch))
        length = ("max_steps", best_step) if config.train.epochs is None else ("epochs", epochs)
        yield Advice(f"stop where it was best, after {best_step} updates", f"train.{length[0]}", length[1])
    yield _scaled_lr(config, 0.5, "or half the LR")
    yield Advice("or dropout on the adapter", "adapter.dropout", max(0.1, config.adapter.dropout))
    yield Advice("or a lower rank", "adapter.rank", max(1, config.adapter.rank // 2))
    yield Advice("or more images, more crops of them, flips where they do no harm")
    decay, wanted = config.optimizer.weight_decay, -math.log(1 - SHRINK_THAT_SHOWS) / max(total_lr, 1e-12)
    acts = f"{decay:g} shrank the weights by {1 - math.exp(-decay * total_lr):.2%} so far"
    yield Advice(f"weight decay hardly acts: {acts}; a shrink of {SHRINK_THAT_SHOWS:.0%} takes about {wanted:.2g}")


def _scaled_lr(config: RunConfig, factor: float, why: str) -> Advice:
    """The base LR times a factor; for Prodigy, whose LR stays 1, the factor on its own estimate."""
    optimizer = config.optimizer
    if isinstance(optimizer, Prodigy):
        key, value = "d_coef", optimizer.d_coef * factor
    else:
        key, value = "lr", min(optimizer.lr * factor, HIGHEST_LR)
    also = ", and the LRs of optimizer.groups alike" if any(group.lr for group in optimizer.groups) else ""
    return Advice(f"{why}{also}", f"optimizer.{key}", float(f"{value:.3g}"))


def _raised_lr(log: TrialLog, config: RunConfig, factor: float) -> Advice:
    """A higher LR: the smallest of the newest fork test that none beats by two SE, else a guess that says so."""
    newest = [fork for fork in log.forks if fork.step == log.forks[-1].step]
    if not newest:
        return _scaled_lr(config, factor, f"{factor:g} x the LR, if a fork test agrees (none was logged)")
    lowest = min(newest, key=lambda fork: float(fork.items_N.mean()))
    ties = [fork for fork in newest if rise_in_se(lowest.items_N, fork.items_N) <= CLEAR_SE]
    best = min(ties, key=lambda fork: fork.factor)
    if best.factor == 1:
        return Advice(f"keep the LR: the fork test at step {best.step} found none better")
    return _scaled_lr(config, best.factor, f"{best.factor:g} x the LR: best in the fork test at step {best.step}")


def _best_before(log: TrialLog) -> Iterator[Advice]:
    """What was saved before it went wrong."""
    if len(log.held_out) and log.held_out.gain > 0:
        step = log.held_out.steps[int(np.argmin(log.held_out.means))]
        yield Advice(f"the LoRA of step {step} was the best: <name>-best.safetensors (validation.keep_best)")


def _follows_a_schedule(config: RunConfig) -> bool:
    """Schedule-free averaging takes a constant LR only."""
    return config.optimizer.type != "schedule_free_adamw"


def _decay(config: RunConfig, why: str) -> Iterator[Advice]:
    """A schedule that comes down, where the one in use does not."""
    schedule = config.lr_scheduler
    if schedule.type in FLAT_SCHEDULES and _follows_a_schedule(config):
        linear = {"type": "linear", "warmup_steps": getattr(schedule, "warmup_steps", 0)}
        yield Advice(why, "lr_scheduler", linear)


def _warmup(config: RunConfig) -> Iterator[Advice]:
    """A rise to the LR, where the schedule in use has none."""
    why = "a warm-up of 5 % brakes the first updates"
    if config.lr_scheduler.type == "constant" and _follows_a_schedule(config):
        yield Advice(why, "lr_scheduler", {"type": "constant_with_warmup", "warmup_steps": "5%"})
    elif getattr(config.lr_scheduler, "warmup_steps", None) == 0:
        yield Advice(why, "lr_scheduler.warmup_steps", "5%")
