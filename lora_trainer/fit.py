"""The whole run, from a plan to the files in the run directory. Read it from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lora_trainer.assembly import Assembly, assemble
from lora_trainer.checkpoint import Checkpoint, Progress
from lora_trainer.errors import NumericStop, Problem, StoppedBySignal
from lora_trainer.prepare import Prepared, files_to_come
from lora_trainer.probing import Measurement, Probing
from lora_trainer.recorder import Recorder
from lora_trainer.resume import find_checkpoint, restore
from lora_trainer.runtime import start_runtime
from lora_trainer.sampling import Sampler
from lora_trainer.tracking.console import Screen, TrainingLine
from lora_trainer.trial import TrialSpec
from lora_trainer.update import MAX_OVERFLOWS_IN_A_ROW, Updater, UpdateResult

MAX_SKIPS_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class FitResult:
    """Where a finished run left its files."""

    step: int
    files: tuple[Path, ...]


def fit(
    prepared: Prepared,
    specs: Sequence[TrialSpec],
    *,
    screen: Screen,
    should_stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train the trials of one plan to the end, resuming from the newest checkpoint where there is one.

    Args:
        should_stop: asked after every update; when it says so, the state is saved and the run ends.

    Raises:
        StoppedBySignal: `should_stop` said so; the same call resumes.
        NumericStop: updates were skipped too often in a row; the last good state is saved.
        ConfigError: the run directory holds a run with another identity.
        TrainerError: the data, base, host or disk is at fault.
    """
    config, plan = prepared.config, prepared.plan
    result = FitResult(plan.num_updates, tuple(files_to_come(config)))
    with start_runtime(prepared.launch, config.train.precision, prepared.threads) as runtime:
        checkpoint = find_checkpoint(prepared, runtime, screen)
        if _is_finished(checkpoint, result):
            screen.say("this run is finished; nothing to do")
            return result

        parts = assemble(prepared, specs, runtime, screen)
        probing = _probing(prepared, parts)
        start = restore(checkpoint, parts.trials, parts.updater)

        recorder = None
        if runtime.launch.is_main:
            sampler = Sampler(
                parts.family, parts.denoiser, parts.cache.prompts, config, prepared.prediction_type, runtime
            )
            recorder = Recorder(
                prepared, runtime, parts.family, parts.bank, parts.trials, parts.updater, sampler, screen
            )
            for note in recorder.open(start, resuming=checkpoint is not None):
                screen.say(note)
        try:
            training_loop(start, plan.num_updates, parts.updater, probing, recorder, screen, should_stop)
        finally:
            if recorder is not None:
                recorder.close()
        runtime.wait_for_everyone()
    return result


class RunRecorder(Protocol):
    """What the loop tells of a run, be it one trial's or a group's."""

    def update(self, progress: Progress, result: UpdateResult, seconds: float, line: TrainingLine) -> None: ...
    def prove(self, progress: Progress) -> None: ...
    def skip(self, progress: Progress, result: UpdateResult) -> None: ...
    def validation(self, progress: Progress, measured: Sequence[Measurement]) -> None: ...
    def save(self, progress: Progress, *, now: bool) -> None: ...
    def deliver(self, progress: Progress) -> None: ...
    def sample(self, progress: Progress) -> None: ...
    def finish(self, progress: Progress) -> None: ...


def training_loop(
    start: Progress,
    num_updates: int,
    updater: Updater,
    probing: Probing | None,
    recorder: RunRecorder | None,
    screen: Screen,
    should_stop: Callable[[], bool],
) -> None:
    """Updates until the planned number is done or no trial is left; `recorder` is that of the main process."""
    progress, skips = start, 0
    if start.attempt == 0:
        _begin(start, probing, recorder)
    elif start.owed and start.step < num_updates and recorder is not None:
        recorder.deliver(start)
    with screen.training(num_updates, start.step) as line:
        while progress.step < num_updates and updater.has_live_trials:
            started = time.perf_counter()
            result = updater.run(progress.attempt, progress.step, stop_asked=should_stop())
            applied = result.skipped is None
            progress = Progress(progress.step + applied, progress.attempt + 1)
            skips = 0 if applied else skips + 1
            if recorder is not None:
                if applied:
                    recorder.update(progress, result, time.perf_counter() - started, line)
                    recorder.prove(progress)
                else:
                    recorder.skip(progress, result)
            if applied and probing is not None and probing.is_due(progress.step):
                measured = probing.measure(progress.step)
                if recorder is not None:
                    recorder.validation(progress, measured)
            last = progress.step == num_updates or not updater.has_live_trials
            ends = last or result.stop_asked or _too_many(skips, result)
            if recorder is not None:
                recorder.save(replace(progress, owed=applied), now=ends)
                if applied and not ends:
                    recorder.deliver(progress)
            if _too_many(skips, result):
                raise _numeric_stop(progress, skips, result)
            if result.stop_asked and not last:
                raise _stopped(progress, num_updates)
    if recorder is not None:
        recorder.finish(progress)


def _begin(start: Progress, probing: Probing | None, recorder: RunRecorder | None) -> None:
    """What is seen before the first update: the base's own samples and probes."""
    measured = probing.start() if probing is not None else []
    if recorder is not None:
        recorder.sample(start)
        recorder.validation(start, measured)


def _probing(prepared: Prepared, parts: Assembly) -> Probing | None:
    """The probes, where the config has a validation section."""
    plan = prepared.plan
    if parts.validator is None or plan.validation is None:
        return None
    return Probing(parts.validator, parts.passes, plan.validation.every, plan.num_updates)


def _is_finished(checkpoint: Checkpoint | None, result: FitResult) -> bool:
    """Whether the last update is done and all its files are there."""
    at_end = checkpoint is not None and checkpoint.progress.step >= result.step
    return at_end and all(file.is_file() for file in result.files)


def _too_many(skips: int, result: UpdateResult) -> bool:
    return skips >= (MAX_OVERFLOWS_IN_A_ROW if result.skipped == "fp16 overflow" else MAX_SKIPS_IN_A_ROW)


def _numeric_stop(progress: Progress, skips: int, result: UpdateResult) -> NumericStop:
    return NumericStop(
        Problem(
            f"{skips} updates in a row had a {result.skipped} that is not finite; step {progress.step} is saved",
            f"images {', '.join(result.files)}",
            fix="lower optimizer.lr (a tenth), use precision bf16 or fp32, and look at the images named",
        )
    )


def _stopped(progress: Progress, num_updates: int) -> StoppedBySignal:
    return StoppedBySignal(
        Problem(
            f"stopped as asked after step {progress.step} of {num_updates}; all is saved",
            fix="the same command resumes here",
        )
    )
