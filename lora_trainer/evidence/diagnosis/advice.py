"""What to change, as settings with values worked out from the run's own. Suggestions: nothing here acts by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_trainer.config.optimizers import Prodigy
from lora_trainer.config.schema import RunConfig
from lora_trainer.evidence.diagnosis.findings import Advice, Finding, State
from lora_trainer.evidence.diagnosis.log import ForkResult, RunFacts, TrialLog
from lora_trainer.evidence.statistics.paired import paired_rise

CLEAR_SE = 2.0
SHRINK_THAT_SHOWS = 0.1
HIGHEST_LR = 0.9  # the config refuses 1 and above
FLAT_SCHEDULES = ("constant", "constant_with_warmup")


def advise(finding: Finding, log: TrialLog, run: RunFacts) -> tuple[Advice, ...]:
    """What to try about a state that was found, the first first."""
    advisor = ADVISORS.get(finding.state)
    return tuple(advisor(finding, log, run)) if finding.status == "found" and advisor else ()


def _scaled_lr(config: RunConfig, factor: float, why: str) -> Advice:
    """The base LR times a factor; for Prodigy, whose LR stays 1, the factor on its own estimate."""
    optimizer = config.optimizer
    key, value = ("d_coef", optimizer.d_coef) if isinstance(optimizer, Prodigy) else ("lr", optimizer.lr)
    also = ", and the LRs of optimizer.groups alike" if any(group.lr for group in optimizer.groups) else ""
    scaled = value * factor if key == "d_coef" else min(value * factor, HIGHEST_LR)
    return Advice(f"{why}{also}", f"optimizer.{key}", float(f"{scaled:.3g}"))


def _follows_a_schedule(config: RunConfig) -> bool:
    """Schedule-free averaging takes a constant LR only."""
    return config.optimizer.type != "schedule_free_adamw"


def _decay(config: RunConfig, why: str) -> list[Advice]:
    """A schedule that comes down, where the one in use does not."""
    schedule = config.lr_scheduler
    if schedule.type not in FLAT_SCHEDULES or not _follows_a_schedule(config):
        return []
    warmup = getattr(schedule, "warmup_steps", 0)
    return [Advice(why, "lr_scheduler", {"type": "linear", "warmup_steps": warmup})]


def _non_finite(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    files = sorted({file for skip in log.skips for file in skip.files})
    advice = [Advice(f"look at the images of the skipped updates: {', '.join(files[:8])}")] if files else []
    if run.config.train.precision in ("auto", "fp16"):
        advice.append(Advice("rule out the precision: fp32 on a short run", "train.precision", "fp32"))
    return [*advice, _scaled_lr(run.config, 0.1, "a tenth of the LR")]


def _diverged(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    config = run.config
    advice = [_scaled_lr(config, 0.1, "start again with a tenth of the LR")]
    warmup = {"type": "constant_with_warmup", "warmup_steps": "5%"}
    if config.lr_scheduler.type == "constant" and _follows_a_schedule(config):
        advice.append(Advice("a warm-up of 5 % brakes the first updates", "lr_scheduler", warmup))
    elif getattr(config.lr_scheduler, "warmup_steps", None) == 0:
        advice.append(Advice("a warm-up of 5 % brakes the first updates", "lr_scheduler.warmup_steps", "5%"))
    return [*advice, *_best_before(log)]


def _best_before(log: TrialLog) -> list[Advice]:
    """What was saved before it went wrong."""
    if not len(log.held_out) or log.held_out.gain <= 0:
        return []
    step = log.held_out.steps[int(np.argmin(log.held_out.means))]
    return [Advice(f"the LoRA of step {step} was the best: <name>-best.safetensors (validation.keep_best)")]


def _oscillating(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    steps = run.config.train.gradient_accumulation_steps
    return [
        _scaled_lr(run.config, 1 / 3, "a third of the LR"),
        *_decay(run.config, "or let the LR decay: the scatter shrinks with it"),
        Advice("or a larger batch, if the LR must stay", "train.gradient_accumulation_steps", 2 * steps),
    ]


def _noise_limited(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    shape = {"type": "warmup_stable_decay", "decay_steps": "20%"}
    if not _follows_a_schedule(run.config):
        return [_scaled_lr(run.config, 1 / 3, "a third of the LR")]
    return [Advice("the LR's own noise is the limit: let it decay to 0 at the end", "lr_scheduler", shape)]


def _stagnant(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    rank = run.config.adapter.rank
    return [
        _raise_lr(log, run.config, 2.0),
        *_decay(run.config, "or let the LR decay, which often gains the last part"),
        Advice("or more room to learn, if a higher LR brings nothing", "adapter.rank", 2 * rank),
    ]


def _never_started(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    return [
        _raise_lr(log, run.config, 3.0),
        Advice("or measure the range first: lora-trainer find-lr"),
        Advice("check that captions and targets fit: the base may know this already, or the prompt may not name it"),
    ]


def _raise_lr(log: TrialLog, config: RunConfig, factor: float) -> Advice:
    """A higher LR: the factor that a fork test found best, the smaller where two tie, else a guess that says so."""
    best = best_fork(log)
    if best is None:
        return _scaled_lr(config, factor, f"{factor:g} x the LR, if a fork test agrees (none was logged)")
    if best.factor == 1:
        return Advice(f"keep the LR: the fork test at step {best.step} found none better")
    return _scaled_lr(config, best.factor, f"{best.factor:g} x the LR: best in the fork test at step {best.step}")


def best_fork(log: TrialLog) -> ForkResult | None:
    """The smallest LR of the newest fork test that no other beats by more than two SE; None where there is none."""
    newest = [fork for fork in log.forks if fork.step == log.forks[-1].step]
    if not newest:
        return None
    lowest = min(newest, key=lambda fork: float(fork.items_N.mean()))
    ties = [fork for fork in newest if paired_rise(lowest.items_N, fork.items_N).z <= CLEAR_SE]
    return min(ties, key=lambda fork: fork.factor)


def _overfit(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    config, total_lr = run.config, math.fsum(log.lrs)
    decay = config.optimizer.weight_decay
    shrink, wanted = 1 - math.exp(-decay * total_lr), -math.log(1 - SHRINK_THAT_SHOWS) / max(total_lr, 1e-12)
    best = int(finding.numbers["best_step"])
    return [
        *_best_before(log),
        *([_length(run, best)] if best > 0 else []),
        _scaled_lr(config, 0.5, "or half the LR"),
        Advice("or dropout on the adapter", "adapter.dropout", max(0.1, config.adapter.dropout)),
        Advice("or a lower rank", "adapter.rank", max(1, config.adapter.rank // 2)),
        Advice("or more images, more crops of them, flips where they do no harm"),
        Advice(
            f"weight decay hardly acts: {decay:g} shrank the weights by {shrink:.2%} so far; "
            f"a shrink of {SHRINK_THAT_SHOWS:.0%} takes about {wanted:.2g}"
        ),
    ]


def _length(run: RunFacts, step: int) -> Advice:
    """A run that ends at a step, in the unit that the config uses."""
    why = f"stop where it was best, after {step} updates"
    if run.config.train.epochs is None:
        return Advice(why, "train.max_steps", step)
    return Advice(why, "train.epochs", max(1, round(step / run.updates_per_epoch)))


def _forgetting(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    sources = "[{dir: <your images>}, {dir: <prior images>}]"
    return [
        Advice(f"train on prior images as well (prior preservation): data.sources={sources}, data.dir=null"),
        _scaled_lr(run.config, 0.5, "or half the LR"),
    ]


def _clipping(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    limit = float(f"{2 * finding.numbers['median_grad_norm']:.2g}")
    return [
        Advice(
            "the clip sets the step, not the LR: raise the limit to twice the median norm", "train.max_grad_norm", limit
        ),
        _scaled_lr(run.config, 0.5, "or half the LR, if the norms grew while training"),
    ]


def _restart_shock(finding: Finding, log: TrialLog, run: RunFacts) -> list[Advice]:
    schedule: dict[str, Any] = {"type": "cosine", "warmup_steps": getattr(run.config.lr_scheduler, "warmup_steps", 0)}
    milder = _scaled_lr(run.config, 1 / 3, "or a third of the LR, so that each restart is milder")
    if not _follows_a_schedule(run.config):
        return [milder]
    return [Advice("one decay without restarts", "lr_scheduler", schedule), milder]


ADVISORS: dict[State, Callable[[Finding, TrialLog, RunFacts], list[Advice]]] = {
    State.NON_FINITE: _non_finite,
    State.DIVERGED: _diverged,
    State.OSCILLATING: _oscillating,
    State.RESTART_SHOCK: _restart_shock,
    State.OVERFIT: _overfit,
    State.FORGETTING: _forgetting,
    State.NEVER_STARTED: _never_started,
    State.STAGNANT: _stagnant,
    State.LR_NOISE_LIMITED: _noise_limited,
    State.CLIPPING: _clipping,
}
