"""The test of the test: leave one part of the state out of a resume, and the equality must fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from stress.torture_trials.record import Trial
from stress.torture_trials.world import Outputs, Prepare, World

from lora_trainer.storage import checkpoint
from lora_trainer.training import fit, resume, trial_writer
from lora_trainer.training.optimizer_step import Updater
from lora_trainer.training.trial import Trial as TrainedTrial

EXIT_STEP, EXITED = 4, 99
FRESH_SCALER = {
    "scale": 2.0**24,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}
PLATEAU = (
    "validation={fraction: 0.5, every_steps: 1, max_cost: 1.0}",
    "lr_scheduler={type: plateau, patience: 2, threshold_se: 100, factor: 0.5}",
    "optimizer.lr=0.05",
)
PRODIGY = ("optimizer={type: prodigy, d_coef: 10}", "train.ema_decay=null")
SAMPLES = ("sample={prompts: [x], num_inference_steps: 1, every_steps: 4}",)
FP16 = ("train.precision=fp16",)


@dataclass(frozen=True, slots=True)
class Control:
    """One part of the state: how to forget it, and settings with which it matters."""

    forget: Prepare
    overrides: tuple[str, ...] = ()


def drop_each_part(world: World) -> Iterator[Trial]:
    """One trial per part of the state; it passes where the resume ends differently without that part."""
    for name, control in CONTROLS.items():
        yield Trial("part of the state left out: noticed", name, _control(world, name.replace(" ", "-"), control))


def _control(world: World, name: str, control: Control) -> Callable[[], str | None]:
    def run() -> str | None:
        straight = _end(world, f"{name}-straight", control.overrides, [])
        ends = []
        for place, forget in ((f"{name}-whole", []), (f"{name}-less", [control.forget])):
            _end(world, place, control.overrides, [_exit_after_save])
            ends.append(_end(world, place, control.overrides, forget))
            world.forget(place)
        world.forget(f"{name}-straight")
        if ends[0] != straight:
            return "the resume differs even with the whole state"
        return "nobody noticed" if ends[1] == straight else None

    return run


def _end(world: World, place: str, overrides: tuple[str, ...], prepare: list[Prepare]) -> Outputs | int:
    """How a run ends: its outputs, or the code it ended with before."""

    def all_of_them() -> None:
        for each in [_skip_one_attempt, _overflow_at_first, *prepare]:
            each()

    code = world.attempt(place, overrides, all_of_them)
    return world.outputs(place) if code == 0 else code


def _exit_after_save() -> None:
    """End the process when the checkpoint of `EXIT_STEP` is saved, before anything else happens."""
    honest = checkpoint.save_checkpoint

    def save(*arguments: Any, **named: Any) -> Any:
        result = honest(*arguments, **named)
        if arguments[1].step == EXIT_STEP:
            os._exit(EXITED)
        return result

    patch.object(trial_writer, "save_checkpoint", save).start()


def _skip_one_attempt() -> None:
    """The second attempt is skipped, so that attempts and steps differ."""
    honest_run, honest_fault, now = Updater.run, Updater._fault, [0]

    def run(self: Updater, attempt: int, step: int, **named: Any) -> Any:
        now[0] = attempt
        return honest_run(self, attempt, step, **named)

    def fault(self: Updater, *numbers: Any) -> str | None:
        return "loss" if now[0] == 1 else honest_fault(self, *numbers)

    patch.object(Updater, "run", run).start()
    patch.object(Updater, "_fault", fault).start()


def _overflow_at_first() -> None:
    """With fp16, start at a gradient scale that overflows for some attempts."""
    patch.object(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**24)).start()


def _without(key: str, *, tensors: bool) -> Prepare:
    """A resume that keeps its fresh value of one part: tensors by part, or a plain value."""

    def install() -> None:
        honest = TrainedTrial.load_state

        def load(self: TrainedTrial, parts: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
            fresh_parts, fresh_plain = self.state()
            if tensors:
                kept = {name: tensor.clone() for name, tensor in fresh_parts[key].items()}
                honest(self, {**parts, key: kept}, plain)
            else:
                honest(self, parts, {**plain, key: fresh_plain[key]})

        patch.object(TrainedTrial, "load_state", load).start()

    return install


def _with_state(change: Callable[[dict[str, Any]], None]) -> Prepare:
    """A resume from a checkpoint whose counters or scaler were changed after it was verified."""

    def install() -> None:
        honest = resume.find_checkpoint

        def find(*arguments: Any) -> Any:
            found = honest(*arguments)
            assert found is not None
            change(found.state)
            return found

        patch.object(fit, "find_checkpoint", find).start()

    return install


CONTROLS = {
    "adapter": Control(_without("adapter", tensors=True)),
    "optimizer tensors": Control(_without("optimizer", tensors=True)),
    "optimizer values": Control(_without("optimizer", tensors=False), PRODIGY),
    "average": Control(_without("average", tensors=True)),
    "plateau memory": Control(_without("feedback", tensors=False), PLATEAU),
    "best probe": Control(_without("best", tensors=False), PLATEAU),
    "gradient scaler": Control(_with_state(lambda state: state.update(scaler=FRESH_SCALER)), FP16),
    "step": Control(_with_state(lambda state: state["progress"].update(step=0))),
    "attempt": Control(_with_state(lambda state: state["progress"].update(attempt=state["progress"]["step"]))),
    "length of the log": Control(_with_state(lambda state: state["progress"].update(metrics_bytes=0))),
    "work owed": Control(_with_state(lambda state: state["progress"].update(owed=False)), SAMPLES),
}
