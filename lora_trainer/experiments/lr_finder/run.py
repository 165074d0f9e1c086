"""The learning-rate finder's run: a ramp on the real data and base, a probe after each update, then all as it was."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lora_trainer.data.holdout import HELD_OUT
from lora_trainer.errors import NumericStop, Problem, StoppedBySignal
from lora_trainer.experiments.lr_finder.analysis import Finding, Point, analyse, has_diverged, paired_gain
from lora_trainer.experiments.lr_finder.forks import Fork, ForkVerdict, fork_lrs, judge_forks
from lora_trainer.experiments.lr_finder.prepare import HIGHEST_LR, PreparedFinder
from lora_trainer.planning.run_plan import DENOISER_GROUP
from lora_trainer.runtime.runtime import start_runtime
from lora_trainer.schedules.schedule import LRSchedule, Warmup
from lora_trainer.tracking.console import Screen
from lora_trainer.training.optimizer_step import MAX_OVERFLOWS_IN_A_ROW, Updater, UpdateResult
from lora_trainer.training.setup import Assembly, assemble
from lora_trainer.training.trial import Trial, TrialSpec

HOPELESS_LOSS = 10.0  # the targets have variance 1, so saying nothing at all costs 1


@dataclass(frozen=True, slots=True)
class Measured:
    """One update of the ramp as it was measured."""

    point: Point
    relative_NS: np.ndarray | None
    """Relative losses of the probe's N images at S strata; None where the update's numbers were not finite."""
    grad_norm: float | None


@dataclass(frozen=True, slots=True)
class Found:
    """All that the finder saw and says."""

    finding: Finding
    measured: tuple[Measured, ...]
    start_NS: np.ndarray
    forks: ForkVerdict | None
    seconds: float

    @property
    def lr(self) -> float:
        """The learning rate to use: the verified one where there is one."""
        return self.finding.suggestion if self.forks is None or self.forks.choice is None else self.forks.choice


def find_lr(finder: PreparedFinder, *, screen: Screen, should_stop: Callable[[], bool] = lambda: False) -> Found:
    """Measure the ramp, read it, and confirm the reading where that was asked for. Writes nothing.

    Args:
        should_stop: asked before every update; when it says so, the finder ends without a result.

    Raises:
        StoppedBySignal: `should_stop` said so.
        TrainerError: the data, base or host is at fault.
    """
    prepared, started = finder.prepared, time.perf_counter()
    with start_runtime(prepared.launch, prepared.config.train.precision, prepared.threads) as runtime:
        parts = assemble(prepared, [TrialSpec(prepared.config.name, prepared.config)], runtime, screen)
        instrument = Instrument(parts, runtime.device, should_stop)
        measured = instrument.run_ramp(finder, screen)
        finding = analyse([each.point for each in measured], finder.fallback_lr)
        forks = None
        if finder.options.verify and finding.verdict == "found":
            lrs = fork_lrs(finding.suggestion, HIGHEST_LR)
            forks = instrument.run_forks(lrs, finder.options.num_verify_updates, screen)
        return Found(finding, tuple(measured), instrument.start_NS, forks, time.perf_counter() - started)


class Instrument:
    """Moves one trial at chosen learning rates and measures its probe; afterwards everything is as it was."""

    def __init__(self, parts: Assembly, device: torch.device, should_stop: Callable[[], bool]) -> None:
        assert parts.validator is not None
        self._trial, self._updater, self._validator = parts.trials[0], parts.updater, parts.validator
        self._device, self._should_stop = device, should_stop
        base_NS = self._validator.base()[HELD_OUT]
        self._base_S = base_NS.mean(axis=0)
        self.start_NS = self._probe()

    def run_ramp(self, finder: PreparedFinder, screen: Screen) -> list[Measured]:
        """Updates at rising learning rates until the ramp ends or the probe diverges."""
        ramp, measured, attempt = finder.ramp, list[Measured](), 0
        every = max(1, ramp.num_updates // 10)
        with restored(self._trial, self._updater, self._device), following(self._trial, ramp.lr):
            for k in screen.track(range(ramp.num_updates), "learning-rate ramp", ramp.num_updates):
                result, attempt = self._update(attempt, k)
                measured.append(self._measured(result, ramp.lr(k)))
                point = measured[-1].point
                if (k + 1) % every == 0:
                    screen.say(f"  lr {point.lr:.2e}  gain {point.gain:+.4%} +- {point.se:.4%}")
                if has_diverged([each.point for each in measured]):
                    break
        return measured

    def run_forks(self, lrs: Sequence[float], num_updates: int, screen: Screen) -> ForkVerdict:
        """A short run at each learning rate from the same state on the same batches."""
        forks = [Fork(lr, self.run_constant(lr, num_updates)) for lr in screen.track(lrs, "verifying", len(lrs))]
        return judge_forks(forks, self.start_NS)

    def run_constant(self, lr: float, num_updates: int) -> np.ndarray | None:
        """The probe [N, S] after a run at one learning rate; None where it diverged."""
        attempt = 0
        with restored(self._trial, self._updater, self._device), following(self._trial, lambda _: lr):
            for k in range(num_updates):
                result, attempt = self._update(attempt, k)
                if result.skipped is not None or result.trials[self._trial.name].loss > HOPELESS_LOSS:
                    return None
            return self._probe()

    def _update(self, attempt: int, k: int) -> tuple[UpdateResult, int]:
        """One update, tried again on the next batch where fp16's scale was too large; and the next attempt.

        Overflows without end are a divergence, unless the very first update has them.
        """
        for _ in range(MAX_OVERFLOWS_IN_A_ROW):
            result = self._updater.run(attempt, k, stop_asked=self._should_stop())
            attempt += 1
            if result.stop_asked:
                raise StoppedBySignal(
                    Problem(f"stopped as asked in update {k}; nothing was changed", fix="start it again")
                )
            if result.skipped != "fp16 overflow":
                return result, attempt
        if k == 0:
            raise NumericStop(Problem("every first update overflows in fp16", fix="use train.precision bf16 or fp32"))
        return result, attempt

    def _measured(self, result: UpdateResult, lr: float) -> Measured:
        if result.skipped is not None:
            return Measured(Point(lr, np.nan, np.nan, np.nan), None, None)
        relative_NS = self._probe()
        gain, se = paired_gain(relative_NS, self.start_NS)
        update = result.trials[self._trial.name]
        point = Point(update.lrs[DENOISER_GROUP], gain, se, update.loss)
        return Measured(point, relative_NS if point.is_finite else None, update.grad_norm)

    def _probe(self) -> np.ndarray:
        """Losses [N, S] relative to the base's mean of each stratum."""
        return self._validator.measure(self._trial.adapter, self._trial.weights())[HELD_OUT].losses_NS / self._base_S


@contextmanager
def restored(trial: Trial, updater: Updater, device: torch.device) -> Iterator[None]:
    """Bring weights, optimizer, gradient scaler and torch's randomness back bitwise, whatever ends the block.

    Ctrl-C does too. All other randomness of a run is keyed by counters and has no state.
    """
    tensors, plain = trial.state()
    saved: tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]] = (
        {part: {name: tensor.clone() for name, tensor in own.items()} for part, own in tensors.items()},
        copy.deepcopy(plain),
    )
    scaler = copy.deepcopy(updater.state())
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            trial.load_state(*saved)
            trial.clear_gradients()
            updater.load_state(scaler)


@contextmanager
def following(trial: Trial, lr_of: Callable[[int], float]) -> Iterator[None]:
    """Let the trial's learning rates follow `lr_of` inside the block; groups keep their ratios to one another."""
    before, base_lr = trial.groups, trial.config.optimizer.lr
    lrs_before = [own["lr"] for own in trial.optimizer.param_groups]
    horizon = before[0].schedule.horizon
    schedule = LRSchedule("finder", horizon, lambda k, _: lr_of(k) / base_lr, Warmup(0))
    trial.groups = tuple(replace(group, schedule=schedule) for group in before)
    try:
        yield
    finally:
        trial.groups = before
        for own, lr in zip(trial.optimizer.param_groups, lrs_before, strict=True):
            own["lr"] = lr
