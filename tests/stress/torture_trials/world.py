"""A run small enough to be tortured a thousand times: the real program on a toy base, one import, a fork per start."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toys import build_toy_base, tiny_unet, write_images, write_plain_pictures

from lora_trainer.cli import train as train_command
from lora_trainer.cli.session import report_error
from lora_trainer.errors import TrainerError
from lora_trainer.tracking.metrics import TIMING_FIELDS, read_rows

NUM_UPDATES = 6
UNEQUAL_EVENTS = ("resume", "checkpoint", "disk")
"""Events that tell of interruptions: the only rows in which an interrupted run may differ."""
CONFIG = """
name: {name}
output_dir: {output}
model: {{path: {base}}}
data: {{dir: {images}, resolution: 32, flip: true, captions: {{dropout: 0.3}}}}
adapter: {{rank: 2, alpha: 2, targets: attention}}
optimizer: {{type: adamw, lr: 1e-3}}
lr_scheduler: {{type: cosine, warmup_steps: 2}}
train: {{max_steps: {updates}, gradient_accumulation_steps: 2, threads: 1, ema_decay: 0.9}}
checkpoint: {{every_steps: 2}}
export: {{every_steps: 3}}
tracking: {{tensorboard: false}}
"""
Prepare = Callable[[], None]


@dataclass(frozen=True)
class Outputs:
    """What must be equal, byte for byte and row for row, however a run was interrupted."""

    files: dict[str, bytes]
    rows: list[dict[str, Any]]

    def difference(self, other: Outputs) -> str | None:
        """What differs, in words; None if nothing does."""
        for name in sorted({*self.files, *other.files}):
            if self.files.get(name) != other.files.get(name):
                return f"{name} differs"
        return None if self.rows == other.rows else "metrics.jsonl has other rows"


@dataclass
class World:
    """Base, images and cache in one folder; runs lie side by side under `runs`."""

    folder: Path
    _references: dict[tuple[str, ...], Outputs] = field(default_factory=dict)

    @classmethod
    def build(cls, folder: Path) -> World:
        """Make base and images, and do everything once in this process, so that later starts find all imported."""
        write_plain_pictures(setattr)  # drawing takes longer than the whole toy run
        world = cls(folder)
        build_toy_base(folder / "base", unet=tiny_unet)
        write_images(folder / "images", num=4, size=(32, 32))
        world.reference()
        return world

    def run_dir(self, place: str) -> Path:
        """The run directory of one trial; the run's name is the same everywhere, as it stands in the files."""
        return self.folder / place / "toy"

    def train(self, place: str, overrides: Sequence[str] = ()) -> None:
        """Train in this process to the end, or to an error."""
        config = self.folder / f"{place}.yaml"
        shared = self.folder / "cache"
        config.write_text(
            CONFIG.format(
                name="toy",
                output=self.folder / place,
                base=self.folder / "base",
                images=self.folder / "images",
                updates=NUM_UPDATES,
            )
        )
        train_command.train(config, [f"data.cache_dir={shared}", *overrides])

    def train_quietly(self, place: str, overrides: Sequence[str] = ()) -> None:
        """Train in this process; what it prints goes to the trial's log."""
        with _quiet(self.folder / f"{place}.log"):
            self.train(place, overrides)

    def reference(self, overrides: Sequence[str] = ()) -> Outputs:
        """The outputs of a run that nothing disturbs."""
        key = tuple(overrides)
        if key not in self._references:
            self.train_quietly("reference", overrides)
            self._references[key] = self.outputs("reference")
            self.forget("reference")
        return self._references[key]

    def start(self, place: str, overrides: Sequence[str] = (), prepare: Prepare | None = None) -> int:
        """Start the run in a process of its own; its pid.

        Args:
            prepare: called in that process first; sets the fault up.
        """
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            with _quiet(self.folder / f"{place}.log"):
                try:
                    if prepare is not None:
                        prepare()
                    self.train(place, overrides)
                    code = 0
                except TrainerError as error:
                    code = report_error(error, debug=False)
                except BaseException:  # noqa: BLE001 - a forked child must never return into the parent's code
                    traceback.print_exc()
        finally:
            os._exit(code)

    def attempt(self, place: str, overrides: Sequence[str] = (), prepare: Prepare | None = None) -> int:
        """Start the run and wait; its exit code, negative for a signal."""
        return wait(self.start(place, overrides, prepare))

    def finished_like_reference(self, place: str, overrides: Sequence[str] = ()) -> str | None:
        """Start the run once more, unattended; what is wrong with its end, None if it equals the reference."""
        code = self.attempt(place, overrides)
        if code != 0:
            return f"the resume ended with {code}: {self.log(place)[-300:]}"
        return self.outputs(place).difference(self.reference(overrides))

    def outputs(self, place: str) -> Outputs:
        """All LoRA files, the last state, and the rows without what tells the time."""
        run_dir = self.run_dir(place)
        last = max((run_dir / "checkpoints").glob("step-????????"))
        files = [*run_dir.glob("*.safetensors"), *run_dir.glob("diffusers/*"), *last.glob("*.safetensors")]
        rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") not in UNEQUAL_EVENTS]
        return Outputs(
            {str(file.relative_to(run_dir)): file.read_bytes() for file in files},
            [{key: value for key, value in row.items() if key not in TIMING_FIELDS} for row in rows],
        )

    def log(self, place: str) -> str:
        """What the last starts of a run printed."""
        return (self.folder / f"{place}.log").read_text()

    def copy(self, place: str, to: str) -> None:
        """Leave at another place what a trial has left at one."""
        shutil.copytree(self.folder / place, self.folder / to)

    def forget(self, place: str) -> None:
        """Remove a trial's files."""
        shutil.rmtree(self.folder / place, ignore_errors=True)
        for left in self.folder.glob(f"{place}.*"):
            left.unlink()


def wait(pid: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> int:
    """Signal a child and wait for its end."""
    os.kill(pid, number)
    return wait(pid)


class _quiet:  # noqa: N801 - reads as a verb
    """Send what is printed inside the block to a file, at the level of file descriptors."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        sys.stdout.flush()
        self._kept = (os.dup(1), os.dup(2))
        target = os.open(self._file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        for number, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, number)
            os.close(kept)
