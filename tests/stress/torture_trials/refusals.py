"""ENOSPC and EIO at every operation: checkpoints stay whole, the LoRA is written, nothing half has a final name."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from stress.torture_trials.faults import FREEING, frees, moments, refuse
from stress.torture_trials.record import Trial
from stress.torture_trials.world import World

from lora_trainer.errors import ExitCode, HostError
from lora_trainer.storage import safetensors_io
from lora_trainer.storage.checkpoint import open_checkpoint

EXPORTED = 3
"""Step of the numbered export, which a disk may refuse for good: the weights move on."""


def at_every_operation(world: World, stride: int = 1) -> Iterator[Trial]:
    """Each operation refused once with EIO; each refused with ENOSPC, with all after it, until the reserve is freed."""
    seen = [moment for moment in moments(lambda: world.train_quietly("counted")) if moment[0] == "before"]
    world.forget("counted")
    trains = next(number for number, (_, operation, _) in enumerate(seen) if operation == "append")
    freed = next(number for number, (_, operation, name) in enumerate(seen) if (operation, name) == FREEING)
    for number in range(0, len(seen), stride):
        yield Trial("EIO at one operation", f"{number}", _refused(world, number, errno.EIO, must_deliver=False))
        if not frees(*seen[number][1:]):  # a full disk refuses no deletion
            must = trains <= number < freed
            yield Trial(
                "ENOSPC from one operation on", f"{number}", _refused(world, number, errno.ENOSPC, must_deliver=must)
            )


def _refused(world: World, number: int, error: int, *, must_deliver: bool) -> Callable[[], str | None]:
    """`must_deliver`: it trains with its reserve held when the disk fills, so that it must come to its LoRA."""
    lasting = error == errno.ENOSPC

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
        if must_deliver and not lora.exists():
            return f"no LoRA was written: {world.log(place)[-300:]}"
        if lora.exists() and lora.read_bytes() != world.reference().files["toy.safetensors"]:
            return "the LoRA written is another one"
        lost = _unsaid_difference(world, place)
        world.forget(place)
        return lost

    return run


def _unsaid_difference(world: World, place: str) -> str | None:
    """What is wrong at the end of one more start, but for what the log says that the disk never took."""
    lost = world.finished_like_reference(place)
    said = world.log(place)
    if lost is not None and "has its LoRA but no checkpoint" in said:
        return None
    numbered = f"toy-step{EXPORTED:08d}.safetensors"
    return None if lost == f"{numbered} differs" and f"step {EXPORTED}: the disk took no export" in said else lost


def _damage(run_dir: Path) -> str | None:
    """A file or checkpoint under its final name that is not whole."""
    for file in (*run_dir.glob("*.safetensors"), *run_dir.glob("diffusers/*")):
        try:
            safetensors_io.load(file)
        except (SafetensorError, OSError) as error:
            return f"{file.name}: {error}"
    for folder in (run_dir / "checkpoints").glob("step-????????"):
        try:
            open_checkpoint(folder.parent, int(folder.name.removeprefix("step-")))
        except HostError as error:
            return str(error)
    return None
