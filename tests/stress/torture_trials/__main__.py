"""`scripts/torture`: all trials, or the short form of the test suite; a table, and the results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table
from stress.torture_trials import controls, corruption, kills, power_loss, refusals
from stress.torture_trials.record import Record, Trial
from stress.torture_trials.world import World

MEMORY = "/dev/shm"
PACKAGES = ("torch", "diffusers", "peft", "accelerate", "safetensors")
FAMILIES = ("kills", "random", "power", "sigterm", "disk", "damage", "writers", "controls")


def chosen_trials(world: World, seed: int, families: list[str], *, short: bool) -> Iterator[Trial]:
    """The trials asked for; the short form takes a part of each, spread over the whole."""
    if "kills" in families:
        yield from kills.at_every_operation(world, stride=17 if short else 1)
    if "random" in families:
        yield from kills.at_random(world, seed, 6 if short else 200)
    if "power" in families:  # on a model of the disk, so no file system's own matter
        yield from power_loss.replayed(world, seed, 600, stride=31 if short else 1)
    if "sigterm" in families:
        yield from kills.terminated(world, seed, 4 if short else 100)
    if "disk" in families:
        yield from refusals.at_every_operation(world, stride=19 if short else 1)
    if "damage" in families:
        yield from corruption.newest(world, seed, 14 if short else 500)
    if "writers" in families:
        yield from kills.second_writers(world, 2 if short else 50)
    if "controls" in families:
        yield from controls.drop_each_part(world)


def main() -> int:
    """Run what has not been run yet; 0 if nothing was lost."""
    said = _arguments()
    record = Record(said.record)
    families = said.only or [name for name in FAMILIES if name != "power" or said.folder is None]
    place = said.folder or (MEMORY if os.access(MEMORY, os.W_OK) else None)
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=place))
    file_system = file_system_of(folder)
    started = time.monotonic()
    try:
        world = World.build(folder)
        complete = record.run(chosen_trials(world, said.seed, families, short=said.short), said.minutes * 60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(record)
    if not complete:
        print(f"time is up after {time.monotonic() - started:.0f} s; the same command goes on")
    if said.output is not None:
        content = results(record, said.seed) | {"complete": complete, "file_system": file_system}
        said.output.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return 1 if record.failures() else 0


def show(record: Record) -> None:
    """The table, and what was lost."""
    table = Table("trials", "passed", "of")
    for family, numbers in record.table().items():
        table.add_row(family, str(numbers["passed"]), str(numbers["trials"]))
    Console().print(table)
    for name, lost in record.failures().items():
        print(f"LOST {name}: {lost}")


def results(record: Record, seed: int) -> dict[str, object]:
    """What a person needs to judge and to repeat the numbers."""
    return {
        "command": f"scripts/torture --seed {seed}",
        "seed": seed,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "trials": record.table(),
        "lost": record.failures(),
    }


def file_system_of(folder: Path) -> str:
    """The kind of file system that a folder lies on, as the kernel calls it; `fuseblk` is one in user space."""
    asked = ["findmnt", "--noheadings", "--output=FSTYPE", "--target", str(folder)]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/torture",
        description="Try to lose a run in a thousand ways: kills, power loss, full disks, damaged files.",
        epilog="Example:  scripts/torture --only kills power   |   scripts/torture --minutes 5  (again to go on)",
    )
    parser.add_argument("--short", action="store_true", help="a part of each family, about a minute")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, help="these families only")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this long; the same command goes on")
    parser.add_argument("--record", type=Path, default=Path("torture.jsonl"), help="outcomes so far, one trial a line")
    parser.add_argument(
        "--folder", type=Path, help="where the runs lie: on the file system to be tried; default memory"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
