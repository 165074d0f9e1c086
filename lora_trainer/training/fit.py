"""Train a group of trials to its end: a solo run, the trials of a sweep, the ramp of the LR finder. Read it first."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError, safe_open

from lora_trainer.errors import OutOfMemory, Problem, StoppedBySignal
from lora_trainer.planning.rows import results_to_come
from lora_trainer.planning.saving import saving_keys
from lora_trainer.runtime.launch import read_launch
from lora_trainer.runtime.runtime import Runtime, choose_precision, start_runtime
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.group import TrialGroup
from lora_trainer.training.resume import ResumePoint, find_resume_point, restore
from lora_trainer.training.setup import Setup, set_up
from lora_trainer.training.trial import Ending, passes_of
from lora_trainer.training.validation import Measurement
from lora_trainer.training.writers import GroupWriter

ShouldStop = Callable[[], bool]
OnMeasure = Callable[[int, Sequence[Measurement]], None]


@dataclass(frozen=True, slots=True)
class FitResult:
    """How each trial of a group came out."""

    step: int
    endings: dict[str, Ending | None]
    """By trial; None where it came to the planned end."""
    was_finished: bool = False
    """Whether there was nothing left to do."""


def fit(
    group: TrialGroup,
    *,
    console: MainConsole,
    should_stop: ShouldStop = lambda: False,
    on_save: Callable[[], None] = lambda: None,
    on_measure: OnMeasure = lambda step, measurements: None,
    joined: PartialState | None = None,
) -> FitResult:
    """Train all trials of a group to the end, resuming from its newest checkpoint where there is one.

    Args:
        should_stop: asked after every update; when it says so, the state is saved and the group ends.
        on_save: called after each checkpoint, in the main process.
        on_measure: called in every process with the probes measured before the first update (step 0) and after others;
            it may end trials.
        joined: the processes, where several groups are trained in a row.

    Raises:
        StoppedBySignal: `should_stop` said so; the same call resumes.
        ConfigError: the folder holds trials with another identity.
        TrainerError: the data, base, host or disk is at fault.
    """
    shared, launch = group.shared, read_launch(group.shared.config)
    with (
        start_runtime(launch, shared.config.train.precision, shared.threads, joined) as runtime,
        _naming_what_helps(group, runtime),
    ):
        point = find_resume_point(group, runtime, console)
        if point is not None and _is_finished(group, point):
            return FitResult(point.step, point.endings, was_finished=True)

        packing = group.trials_per_pass  # part of the rounding, so `auto` stays what it became
        if point is not None and packing == "auto":
            packing = point.trials_per_pass
        # One frozen denoiser for all trials: SD 1.5's UNet is 860 M numbers, 3.2 GiB in fp32, half of it in bf16.
        # The encoders are gone before: an image is its latents, 4 x 64 x 64 at 512 px, a caption 77 x 768 numbers.
        setup = set_up(group, runtime, console, trials_per_pass=packing)
        with runtime.phase("loading", together=True):
            start = restore(point, group, setup.trials)
        with closing(GroupWriter(group, setup, console, on_save)) as writer:
            writer.open(point)
            step = train_loop(start, setup, writer, console=console, should_stop=should_stop, on_measure=on_measure)
        runtime.wait_for_all()
    return FitResult(step, {trial.name: trial.ending for trial in setup.trials})


def train_loop(
    start: int,
    setup: Setup,
    writer: GroupWriter,
    *,
    console: MainConsole,
    should_stop: ShouldStop,
    on_measure: OnMeasure,
) -> int:
    """Updates from number `start` on until the planned number is done or no trial is left; how many were done.

    Raises:
        OutOfMemory: what could be saved is.
    """
    step, num_steps = start, setup.num_steps
    try:
        setup.optimizer_step.settle_scales(start)  # fp16 alone, once a trial: a backward for each halving from 2**16
        _catch_up(start, setup, writer, on_measure)
        with console.training(num_steps, start) as line:
            while step < num_steps and setup.optimizer_step.has_live_trials:
                # update k = step: batch, timesteps, noise and LR are those of k, whatever was skipped before
                started = time.perf_counter()
                result = setup.optimizer_step.run(step, stop_asked=should_stop())
                step += 1
                writer.update(step, result, time.perf_counter() - started, line)
                if setup.validation is not None and setup.validation.is_due(step):
                    _probe(step, setup, writer, on_measure)

                is_last = step == num_steps or not setup.optimizer_step.has_live_trials
                # fp32: adapter, two moments of AdamW are 3 x 26 MiB a trial at rank 16 on SD 1.5's transformer layers
                writer.save(step, now=is_last or result.stop_asked)
                writer.keep_best(step)
                if result.stop_asked and not is_last:
                    what = f"stopped as asked after step {step} of {num_steps}; all is saved"
                    raise StoppedBySignal(Problem(what, fix="the same command resumes here"))
                if not is_last:
                    writer.export_and_sample(step)
        writer.finish(step)
    except OutOfMemory as refused:
        writer.secure(step, refused)
        refused.trials_per_pass = max(map(len, passes_of(setup.trials, setup.trials_per_pass)))
        raise
    return step


def _catch_up(start: int, setup: Setup, writer: GroupWriter, on_measure: OnMeasure) -> None:
    """What is due at the step that a start begins with; before, a checkpoint of it was written."""
    if start == 0:
        with setup.denoiser.runtime.phase("probe"):
            measurements = setup.validation.start() if setup.validation is not None else []
        writer.begin(measurements)
        on_measure(0, measurements)
        return
    if writer.owes_probe:
        _probe(start, setup, writer, on_measure)
    writer.keep_best(start)
    if start < setup.num_steps:
        writer.export_and_sample(start)


def _probe(step: int, setup: Setup, writer: GroupWriter, on_measure: OnMeasure) -> None:
    """N images x 16 timesteps, forward only: with its period within `validation.max_cost` of the training."""
    if setup.validation is not None:
        with setup.denoiser.runtime.phase("probe"):
            measurements = setup.validation.measure(step)
        writer.measured(step, measurements)
        on_measure(step, measurements)


@contextmanager
def _naming_what_helps(group: TrialGroup, runtime: Runtime) -> Iterator[None]:
    """Where memory is refused inside the block, say by which settings the same command needs less of it."""
    try:
        yield
    except OutOfMemory as refused:
        packed, on_gpu = refused.trials_per_pass, choose_precision("auto", runtime.device) != "fp32"
        fixed = tuple(f"{key}." for member in group.members for key in member.trial.overrides)  # these win
        helping = [
            shlex.join(keys)
            for keys in saving_keys(group.shared.config, refused.phase, trials_per_pass=packed, on_gpu=on_gpu)
            if not any(f"{key.partition('=')[0]}.".startswith(fixed) for key in keys)
        ]
        why = "; ".join(filter(None, [refused.why, refused.kept]))
        fix = "\n         ".join(["add the first of these lines that is enough to the same command:", *helping])
        free = "free memory that other programs hold (nvidia-smi, top)"
        none = f"{free}; no setting needs less here and trains the same LoRA"
        raise OutOfMemory(refused.phase, why, f"{fix}\n         or {free}" if helping else none) from refused


def _is_finished(group: TrialGroup, point: ResumePoint) -> bool:
    """Whether no trial goes on, with all the files of those that came to the end."""
    complete = [member.prepared.config for member in group.members if point.endings[member.name] is None]
    is_over = point.step >= group.num_steps or not complete
    return is_over and all(_is_whole(file) for config in complete for file in results_to_come(config))


def _is_whole(file: Path) -> bool:
    """Whether a result is there; of a LoRA also that no part of it is missing."""
    if file.suffix != ".safetensors" or not file.is_file():
        return file.is_file()
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a few updates of a group took on this machine."""

    trials_per_pass: int
    activation_bytes: int
    """Kept by the forward of one trial and one micro-batch."""
    peak_memory_gib: float
    seconds_per_step: float
    seconds: float
    """For the whole group: its updates, and its probes by their share of the cost."""


def estimate(group: TrialGroup, *, console: MainConsole, joined: PartialState | None = None) -> Estimate:
    """Time a group on this machine and data by three updates whose results are thrown away.

    Raises:
        TrainerError: the data, base or host is at fault.
    """
    shared, launch = group.shared, read_launch(group.shared.config)
    with (
        start_runtime(launch, shared.config.train.precision, shared.threads, joined) as runtime,
        _naming_what_helps(group, runtime),
    ):
        setup = set_up(group, runtime, console, trials_per_pass=group.trials_per_pass)
        seconds = []
        for k in range(3):  # the first warms up kernels and allocator, so the fastest stands for all
            started = time.perf_counter()
            setup.optimizer_step.run(k, stop_asked=False)
            seconds.append(time.perf_counter() - started)
        num_shared = sum(member.prefix.step for member in group.members if member.prefix is not None)
        updates = group.num_steps - num_shared / len(group.members)
        probes = 0.0 if shared.plan.validation is None else shared.plan.validation.cost
        return Estimate(
            setup.trials_per_pass,
            setup.optimizer_step.activation_bytes(),
            runtime.peak_memory_gib(),
            min(seconds),
            min(seconds) * updates * (1 + probes),
        )
