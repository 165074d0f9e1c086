"""What all rules amount to, of a stored run or of one that goes on; what to try (nothing acts by itself)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_trainer.config.optimizers import Prodigy
from lora_trainer.config.schema import RunConfig
from lora_trainer.evidence.diagnosis import rules
from lora_trainer.evidence.diagnosis.findings import Advice, Finding, State
from lora_trainer.evidence.diagnosis.log import RunFacts, TrialLog
from lora_trainer.evidence.diagnosis.rules import Thresholds
from lora_trainer.evidence.statistics.paired import ROUNDING, rise_in_se

CLEAR_SE = 2.0
SHRINK_THAT_SHOWS = 0.1
HIGHEST_LR = 0.9  # the config refuses 1 and above
FLAT_SCHEDULES = ("constant", "constant_with_warmup")
WITH_PRIOR = "data.sources=[{dir: <your images>}, {dir: <prior images>}], data.dir=null"
UNFIT = "the base may know this already, or the prompt may not name it"
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
    for state, answer in answers.items():
        if answer.status == "found":
            answers[state] = replace(answer, advice=tuple(_advice(answer, log, run)))
    return Diagnosis(run.config.name, log.step, tuple(answers.values()))


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


def _advice(finding: Finding, log: TrialLog, run: RunFacts) -> Iterator[Advice]:
    """What to try about a state that was found, the first first."""
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
        epochs = max(1, round(best_step / run.steps_per_epoch))
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
    late = probe.at_or_after(max(run.steps_per_epoch, math.ceil(EARLY_SHARE * run.num_steps)))
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
        self._metrics, self._run = metrics, run
        self.log.catch_up(metrics)

    def look(self) -> Iterator[Note]:
        """Read the new rows; what has changed. Each note must be logged before the next look."""
        self.log.catch_up(self._metrics)
        log, name = self.log, self._run.config.name
        if not log.early_reported and (early := early_report(log, self._run)) is not None:
            line = f"early report of {name} at step {early.step}: {'; '.join(early.sentences)}"
            yield Note("early_report", early.as_event(), (line,))
        diagnosis = diagnose(log, self._run)
        if diagnosis.verdict != (log.verdict or ("healthy",)):  # that all is well goes without saying at first
            lines = [line for finding in diagnosis.found for line in finding_lines(finding)]
            content = {"findings": [finding.as_json() for finding in diagnosis.found]}
            yield Note("diagnosis", content, (f"diagnosis of {name} at step {diagnosis.step}:", *lines))


def finding_lines(finding: Finding) -> Iterator[str]:
    """A state that was found, its evidence, and what to try."""
    yield f"  {finding.state} ({finding.confidence} confidence): {finding.evidence}"
    for advice in finding.advice:
        yield f"    try: {advice.text}" + (f"  ->  {advice.override}" if advice.override else "")
