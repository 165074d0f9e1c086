"""ENOSPC and EIO at every operation: checkpoints stay whole, the LoRA is written, nothing half has a final name."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_trainer import tensor_file
from lora_trainer.checkpoint import open_checkpoint
from lora_trainer.errors import ExitCode, HostError
from torture_trials.faults import moments, refuse
from torture_trials.record import Trial
from torture_trials.world import World


def at_every_operation(world: World, stride: int = 1) -> Iterator[Trial]:
    """Each operation refused once with EIO; each refused with ENOSPC, with all after it, until the reserve is freed."""
    seen = [moment for moment in moments(lambda: world.train_quietly("counted")) if moment[0] == "before"]
    world.forget("counted")
    started = next(number for number, (_, operation, _) in enumerate(seen) if operation == "reserve") + 1
    for number in range(0, len(seen), stride):
        yield Trial(
            "EIO at one operation", f"{number}", _refused(world, number, errno.EIO, lasting=False, started=started)
        )
        yield Trial(
            "ENOSPC from one operation on",
            f"{number}",
            _refused(world, number, errno.ENOSPC, lasting=True, started=started),
        )


def _refused(world: World, number: int, error: int, *, lasting: bool, started: int) -> Callable[[], str | None]:
    """`started`: from this operation on the run has its reserve, so that it must come to its LoRA."""

    def run() -> str | None:
        place = f"refused-{error}-{number}"
        happened = world.folder / f"{place}.refused"
        code = world.attempt(place, prepare=refuse(number, error, until_space_is_freed=lasting, happened=happened))
        if not happened.exists():
            return "nothing was refused"
        if code not in (ExitCode.DONE, ExitCode.ENVIRONMENT):
            return f"exit code {code}: {world.log(place)[-300:]}"
        if fault := _damage(world.run_dir(place)):
            return fault
        lora = world.run_dir(place) / "toy.safetensors"
        if lasting and number >= started and not lora.exists():
            return f"no LoRA was written: {world.log(place)[-300:]}"
        if lora.exists() and lora.read_bytes() != world.reference().files["toy.safetensors"]:
            return "the LoRA written is another one"
        lost = world.finished_like_reference(place)
        if lost is not None and "has its LoRA but no checkpoint" in lost:  # it said so, and nothing was lost
            lost = None if lasting and lora.exists() else lost
        world.forget(place)
        return lost

    return run


def _damage(run_dir: Path) -> str | None:
    """A file or checkpoint under its final name that is not whole."""
    for file in (*run_dir.glob("*.safetensors"), *run_dir.glob("diffusers/*")):
        try:
            tensor_file.load(file)
        except (tensor_file.SafetensorError, OSError) as error:
            return f"{file.name}: {error}"
    for folder in (run_dir / "checkpoints").glob("step-????????"):
        try:
            open_checkpoint(folder.parent, int(folder.name.removeprefix("step-")))
        except HostError as error:
            return str(error)
    return None
