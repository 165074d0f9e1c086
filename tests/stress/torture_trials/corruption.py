"""The newest checkpoint damaged in many ways: always noticed, always the one before it instead, never a fresh start."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from stress.torture_trials.faults import kill_at, moments
from stress.torture_trials.record import Trial
from stress.torture_trials.world import World

Damage = Callable[[Path, random.Random], None]


def newest(world: World, seed: int, count: int) -> Iterator[Trial]:
    """Damage a killed run's newest checkpoint, and let the run go on."""
    seen = moments(lambda: world.train_quietly("counted"))
    world.forget("counted")
    pruned = max(number for number, (_, operation, name) in enumerate(seen) if operation == "delete" and "step" in name)
    world.attempt("whole", prepare=kill_at(pruned + 1))
    for index in range(count):
        yield Trial("damaged newest checkpoint", f"{index}", _damaged(world, seed, index))


def _damaged(world: World, seed: int, index: int) -> Callable[[], str | None]:
    def run() -> str | None:
        draw = random.Random(f"damage {seed} {index}")
        kind, damage = draw.choice(sorted(DAMAGES.items()))
        place = f"damaged-{index}"
        world.copy("whole", place)
        checkpoints = sorted((world.run_dir(place) / "checkpoints").glob("step-*"))
        damage(checkpoints[-1], draw)
        lost = world.finished_like_reference(place)
        if lost is None and f"{checkpoints[-1].name} is damaged" not in world.log(place):
            lost = "the damage went unnoticed"
        if lost is None and not checkpoints[-1].with_name(checkpoints[-1].name + ".corrupt").exists():
            lost = "the damaged checkpoint was not kept aside"
        world.forget(place)
        return None if lost is None else f"{kind}: {lost}"

    return run


def _flip_bits(folder: Path, draw: random.Random) -> None:
    file = _one_file(folder, draw)
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 8, 64])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _cut(folder: Path, draw: random.Random) -> None:
    file = _one_file(folder, draw)
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def _lengthen(folder: Path, draw: random.Random) -> None:
    file = _one_file(folder, draw)
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 4096)))


def _zero(folder: Path, draw: random.Random) -> None:
    file = _one_file(folder, draw)
    content = file.read_bytes()
    start = draw.randrange(len(content))
    file.write_bytes(content[:start] + bytes(len(content) - start))


def _remove(folder: Path, draw: random.Random) -> None:
    _one_file(folder, draw).unlink()


def _take_from_older(folder: Path, draw: random.Random) -> None:
    older = min(folder.parent.glob("step-*"))
    tensors = draw.choice(sorted(folder.glob("*.safetensors")))
    shutil.copy(older / tensors.name, tensors)


def _leave_out_of_manifest(folder: Path, draw: random.Random) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][draw.choice(sorted(manifest["files"]))]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _one_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.iterdir()))


DAMAGES: dict[str, Damage] = {
    "bits flipped": _flip_bits,
    "cut short": _cut,
    "made longer": _lengthen,
    "zeroed to its end": _zero,
    "file removed": _remove,
    "file of an older checkpoint": _take_from_older,
    "left out of the manifest": _leave_out_of_manifest,
}
