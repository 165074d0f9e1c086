"""The test of the test: leave one part of the state out of a resume, and the equality must fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from stress.torture_trials.record import Trial
from stress.torture_trials.world import Outputs, Prepare, World

from lora_trainer.storage import checkpoint
from lora_trainer.training import resume, writers
from lora_trainer.training.optimizer_step import OptimizerStep
from lora_trainer.training.trial import Trial as TrainedTrial
from lora_trainer.training.writers import GroupWriter

EXIT_STEP, EXITED = 4, 99
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
    skipped: tuple[int, ...] = (1,)
    """Updates whose loss is said not to be finite, so that a log has fewer rows than steps."""


def drop_each_part(world: World) -> Iterator[Trial]:
    """One trial per part of the state; it passes where the resume ends differently without that part."""
    ends: dict[Any, Outputs | int] = {}
    for name, control in CONTROLS.items():
        yield Trial("part of the state left out: noticed", name, _control(world, name.replace(" ", "-"), control, ends))


def _control(world: World, name: str, control: Control, ends: dict[Any, Outputs | int]) -> Callable[[], str | None]:
    """`ends`: how straight runs ended, by their settings; also resumes with the whole state end so."""

    def run() -> str | None:
        settings, saved = (control.overrides, control.skipped), f"{name}-saved"
        _end(world, saved, control, [_exit_after_save])
        if settings not in ends:
            ends[settings] = _end(world, f"{name}-straight", control, [])
            world.copy(saved, f"{name}-whole")
            if _end(world, f"{name}-whole", control, []) != ends[settings]:
                return "the resume differs even with the whole state"
        without = _end(world, saved, control, [control.forget])
        for place in ("straight", "whole", "saved"):
            world.forget(f"{name}-{place}")
        return "nobody noticed" if without == ends[settings] else None

    return run


def _end(world: World, place: str, control: Control, prepare: list[Prepare]) -> Outputs | int:
    """How a run ends: its outputs, or the code it ended with before."""

    def all_of_them() -> None:
        _skip(control.skipped)
        _overflow_at_first()
        for each in prepare:
            each()

    code = world.attempt(place, control.overrides, all_of_them)
    return world.outputs(place) if code == 0 else code


def _exit_after_save() -> None:
    """End the process when the checkpoint of `EXIT_STEP` is saved, before anything else happens."""
    honest = checkpoint.save_checkpoint

    def save(*arguments: Any, **named: Any) -> Any:
        result = honest(*arguments, **named)
        if arguments[1] == EXIT_STEP:
            os._exit(EXITED)
        return result

    patch.object(writers, "save_checkpoint", save).start()


def _skip(updates: tuple[int, ...]) -> None:
    """The loss of these updates is not finite, as the run sees it."""
    honest_run, honest_fault, now = OptimizerStep.run, TrainedTrial.fault, [0]

    def run(self: OptimizerStep, k: int, **named: Any) -> Any:
        now[0] = k
        return honest_run(self, k, **named)

    def fault(self: TrainedTrial, *numbers: float) -> str | None:
        return "loss" if now[0] in updates else honest_fault(self, *numbers)

    patch.object(OptimizerStep, "run", run).start()
    patch.object(TrainedTrial, "fault", fault).start()


def _overflow_at_first() -> None:
    """With fp16, start at a loss scale that overflows until it is settled."""
    patch.object(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**24)).start()


def _without(key: str, *, tensors: bool) -> Prepare:
    """A resume that keeps its fresh value of one part: tensors by part, or a plain value."""

    def install() -> None:
        honest = TrainedTrial.load_state

        def load(self: TrainedTrial, parts: Mapping[str, Any], plain: Mapping[str, Any], **named: Any) -> None:
            fresh_parts, fresh_plain = self.state()
            if tensors:
                kept = {name: tensor.clone() for name, tensor in fresh_parts[key].items()}
                honest(self, {**parts, key: kept}, plain, **named)
            else:
                honest(self, parts, {**plain, key: fresh_plain[key]}, **named)

        patch.object(TrainedTrial, "load_state", load).start()

    return install


def _with_state(change: Callable[[dict[str, Any]], None]) -> Prepare:
    """A resume from a checkpoint whose JSON was changed after it was verified."""

    def install() -> None:
        honest = checkpoint.newest_checkpoint

        def find(folder: Path) -> Any:
            found, faults = honest(folder)
            assert found is not None
            change(found.state)
            return found, faults

        patch.object(resume, "newest_checkpoint", find).start()

    return install


def _of_trial(**values: Any) -> Prepare:
    """A resume from a checkpoint that says other things of its one trial."""

    def change(state: dict[str, Any]) -> None:
        (trial,) = state["trials"].values()
        trial.update(values)

    return _with_state(change)


def _nothing_due() -> None:
    """A resume that takes what was due at the checkpoint's step as done."""
    honest = GroupWriter.export_and_sample

    def later(self: GroupWriter, step: int) -> None:
        if step != EXIT_STEP:
            honest(self, step)

    patch.object(GroupWriter, "export_and_sample", later).start()


CONTROLS = {
    "adapter": Control(_without("adapter", tensors=True)),
    "optimizer tensors": Control(_without("optimizer", tensors=True)),
    "optimizer values": Control(_without("optimizer", tensors=False), PRODIGY),
    "average": Control(_without("average", tensors=True)),
    "plateau memory": Control(_without("feedback", tensors=False), PLATEAU),
    "best probe": Control(_without("best", tensors=False), PLATEAU),
    "loss scale": Control(_without("scaler", tensors=False), FP16),
    "skips in a row": Control(_without("skips", tensors=False), skipped=(2, 3, 4)),
    "ending": Control(_of_trial(ending=None), skipped=(1, 2, 3)),
    "step": Control(_with_state(lambda state: state.update(step=0))),
    "length of the log": Control(_of_trial(metrics_bytes=0)),
    "what is due at its step": Control(_nothing_due, SAMPLES),
}
