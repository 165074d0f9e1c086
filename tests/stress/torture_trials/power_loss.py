"""The power goes between any two operations: whatever the disk then holds, no reported checkpoint is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from stress.torture_trials.disk_model import CutMoment, DiskTracer, possible_state
from stress.torture_trials.record import Trial
from stress.torture_trials.world import World

from lora_trainer.storage import atomic_files
from lora_trainer.storage.checkpoint import newest_checkpoint, save_checkpoint
from lora_trainer.training import writers


def replayed(world: World, seed: int, count: int, stride: int = 1) -> Iterator[Trial]:
    """Trace one run, then build states that power cuts may leave, and let each of them go on."""
    moments = trace(world)
    for index in range(0, count, stride):
        yield Trial("power loss", f"{index}", _cut(world, moments, seed, index))


def trace(world: World) -> list[CutMoment]:
    """All moments of an undisturbed run in which the power may go."""
    place = world.folder / "traced"
    place.mkdir()
    tracer = DiskTracer(place)

    def saved(*arguments: Any, **named: Any) -> Any:
        result = save_checkpoint(*arguments, **named)
        tracer.reported = arguments[1]
        return result

    with patch.object(writers, "save_checkpoint", saved), atomic_files.observe_operations(tracer):
        world.train_quietly("traced")
    world.forget("traced")
    return tracer.moments


def _cut(world: World, moments: list[CutMoment], seed: int, index: int) -> Callable[[], str | None]:
    def run() -> str | None:
        draw = random.Random(f"power {seed} {index}")
        cut = moments[index % len(moments)]
        place = f"power-{index}"
        possible_state(cut, draw, world.folder / place)
        lost = _reported_is_lost(world, place, cut) or world.finished_like_reference(place)
        world.forget(place)
        return lost if lost is None else f"moment {index % len(moments)}: {lost}"

    return run


def _reported_is_lost(world: World, place: str, cut: CutMoment) -> str | None:
    if cut.reported is None:
        return None
    found, faults = newest_checkpoint(world.run_dir(place) / "checkpoints")
    if found is None or found.state["step"] < cut.reported:
        there = "none" if found is None else f"step {found.state['step']}"
        return f"step {cut.reported} was reported as saved, {there} is there ({'; '.join(faults)})"
    return None
