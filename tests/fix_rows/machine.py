"""What the machine refuses: launchers, locks, folders, checkpoints and full disks."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from faults import refuse_memory, refusing, stop_after
from fixes import Row, World, said, valued, written

from fix_rows import commands
from fix_rows.commands import again, words
from fix_rows.configuration import added
from lora_trainer.config.load import load_config
from lora_trainer.config.places import run_directory
from lora_trainer.errors import Problem
from lora_trainer.runtime import device
from lora_trainer.storage import atomic_files, checkpoint, disk_space, locks
from lora_trainer.training.optimizer_step import OptimizerStep

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
PRECISION, ACCUMULATION = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def inherited(**variables: str) -> Callable[[World], None]:
    """Variables of the shell that starts it."""

    def act(world: World) -> None:
        for name, value in variables.items():
            world.patch.setenv(name, value)

    return act


def unset(world: World, problem: Problem) -> None:
    """The shell command that the fix prints."""
    names = re.search(r"unset ([A-Z_ ]+)", str(problem.fix))
    assert names, problem
    for name in names[1].split():
        world.patch.delenv(name)


LAUNCH = [
    replace(row, command=("check",))
    for row in [
        Row(inherited(**TWO), unset),
        Row(inherited(WORLD_SIZE="two"), unset),
        Row(inherited(RANK="3"), unset),
        Row(inherited(OMPI_COMM_WORLD_SIZE="4"), unset),
        Row(
            inherited(ACCELERATE_DYNAMO_BACKEND="inductor"),
            said("--dynamo_backend no", inherited(ACCELERATE_DYNAMO_BACKEND="no")),
        ),
        Row(inherited(**{PRECISION: "fp16"}), written()),
        Row(inherited(**{PRECISION: "bf16"}), said("--mixed_precision no", inherited(**{PRECISION: "no"}))),
        Row(inherited(**{PRECISION: "fp8"}), said("--mixed_precision no", inherited(**{PRECISION: "no"}))),
        Row(inherited(**{ACCUMULATION: "4"}), written()),
        Row(inherited(**{ACCUMULATION: "4"}), unset),
        Row(
            inherited(ACCELERATE_USE_DEEPSPEED="true"),
            said("choose no engine", inherited(ACCELERATE_USE_DEEPSPEED="false")),
        ),
    ]
]


def locked(world: World) -> None:
    """Another process writes the run."""
    Path("runs/run").mkdir(parents=True)
    world.held = Path("runs/run/.lock").open("a")  # type: ignore[attr-defined] # noqa: SIM115
    fcntl.flock(world.held, fcntl.LOCK_EX)  # type: ignore[attr-defined]


def freed(world: World) -> None:
    world.held.close()  # type: ignore[attr-defined]


def written_to(world: World) -> None:
    """The run's directory is taken, as before everything else, and a file is written into it."""

    def call() -> None:
        folder = run_directory(load_config(world.config, world.words))
        with disk_space.faults_in_words(), locks.sole_writer(folder, print):
            disk_space.check_room(folder, 10_000, "some files")
            atomic_files.write_file(folder / "plan.json", b"{}")

    world.call = call


def taken(wrong: str | Callable[[World], object], mend: Callable[[World, Problem], object]) -> Row:
    def act(world: World) -> None:
        written_to(world)
        if callable(wrong):
            wrong(world)
        else:
            world.words.append(wrong)

    return Row(act, mend)


def linked(world: World) -> None:
    Path("runs/run").mkdir(parents=True)
    Path("mine").write_text("mine")
    Path("runs/run/.lock").symlink_to(Path("mine").absolute())


LOCKS = [
    taken(linked, said("take it out", lambda _: Path("runs/run/.lock").unlink())),
    taken(locked, said("stop it", freed)),
    taken(locked, said("another `name`", added("name=other"))),
    taken(locked, said("delete ", lambda _: Path("runs/run/.lock").unlink())),
]
ATOMIC = [
    taken(
        lambda world: (world.folder / "runs").symlink_to("gone"),
        said("make what it leads to", lambda _: Path("gone").mkdir()),
    ),
    taken("output_dir=/proc/none", said("choose another place", added("output_dir=elsewhere"))),
]


def damaged(*steps: str) -> Callable[[World], None]:
    """Checkpoints of a finished run are damaged, all or those of these steps."""

    def act(world: World) -> None:
        run = world.trained("saved", "checkpoint.every_steps=1")
        for step in sorted((run / "checkpoints").glob("step-*")):
            shutil.copytree(step, world.folder / "backup" / step.name)
            if not steps or step.name.endswith(steps):
                (step / "manifest.json").write_text("{}")
        world.words += ["name=saved", "checkpoint.every_steps=1"]

    return act


def restored(_: World) -> None:
    shutil.copytree("backup", "runs/saved/checkpoints", dirs_exist_ok=True)


def unreadable(world: World) -> None:
    """The disk does not answer for the newest checkpoint."""
    damaged("none")(world)
    honest = checkpoint._fault

    def fault(folder: Path) -> str | None:
        if folder.name.endswith("2"):
            raise OSError(errno.EIO, "Input/output error", str(folder))
        return honest(folder)

    world.faults.setattr(checkpoint, "_fault", fault)


def newer(world: World) -> None:
    """A later version wrote the checkpoints."""
    damaged("none")(world)
    for file in Path("runs/saved/checkpoints").glob("*/*.json"):
        if file.name in ("manifest.json", "state.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


def afresh(world: World) -> None:
    world.command = (*world.command, "--fresh")


def opened(wrong: Callable[[World], object]) -> Callable[[World], None]:
    """A run looks for its newest checkpoint."""

    def act(world: World) -> None:
        wrong(world)
        world.call = lambda: checkpoint.newest_checkpoint(
            run_directory(load_config(world.config, world.words)) / "checkpoints"
        )

    return act


CHECKPOINTS = [
    Row(opened(damaged()), said("restore one", restored)),
    Row(damaged(), said("--fresh", afresh), command=("train",)),
    Row(
        lambda world: (damaged("2")(world), words("export", "runs/saved", "--step", "2", "-o", "x.safetensors")(world)),
        said("another step", again("2", "1")),
    ),
    Row(opened(unreadable), said("once the disk answers", lambda world: world.faults.undo())),
    Row(
        opened(unreadable),
        said("move that checkpoint away", lambda _: next(Path("runs/saved/checkpoints").glob("*2")).rename("away")),
    ),
    Row(opened(newer), said("another `name`", added("name=other"))),
]


def crowded(world: World) -> None:
    world.faults.setattr(disk_space, "free_bytes", lambda folder: 1000 if "runs" in str(folder) else 10**12)


def answering(error: int, operation: str, name: str) -> Callable[[World], None]:
    """What the disk or a folder answers where this file is written."""

    def act(world: World) -> None:
        world.faults.setattr(atomic_files, "_observer", refusing(operation, name, error))

    return act


def healed(world: World) -> None:
    world.faults.undo()


def out_of_memory(world: World) -> None:
    world.faults.setattr(atomic_files, "write_file", lambda *_: bytearray(2**62))


DISK = [
    taken(out_of_memory, said("free memory", healed)),
    taken(crowded, said("free some space", healed)),
    taken(crowded, said("another output_dir", added("output_dir=elsewhere"))),
    *(
        taken(answering(error, "write", "plan.json"), said(words, healed))
        for error, words in {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.EACCES: "let this user write",
            errno.EROFS: "let this user write",
            errno.EIO: "look after the disk",
            errno.ENAMETOOLONG: "another place",
            errno.EMFILE: "ulimit -n 4096",
        }.items()
    ),
]


def full(world: World) -> None:
    """The disk takes no checkpoint, and the run may not go on without."""
    world.words.append("checkpoint.on_disk_full=stop")
    answering(errno.ENOSPC, "write", "adapter")(world)


THREE = "sweep={grid: {optimizer.lr: [1e-3, 1e-4, 1e-5]}}"


def old_card(world: World) -> None:
    """A GPU without bf16."""
    world.patch.setattr(device, "_visible_card", lambda: device.Device("Old", 2**34, 2**34, "GPU-a", has_bf16=False))
    world.words.append("train.precision=bf16")


DEVICE = [
    Row(old_card, valued(r"write (\w+) or", "train.precision"), command=("check",)),
    Row(old_card, valued(r"or (\w+)$", "train.precision"), command=("check",)),
]


def short_of_memory(world: World) -> None:
    refuse_memory(world.faults, (OptimizerStep, "_losses"), operation=9)


def first_line(world: World, problem: Problem) -> None:
    """The first line of settings is added to the same command, and is enough."""
    line = str(problem.fix).splitlines()[1]
    world.words += shlex.split(line)
    world.faults.undo()


MEMORY = [
    Row(short_of_memory, first_line, command=("train",), about="add the first of these lines"),
]
STOPPED = [
    Row(lambda world: stop_after(world.faults, 1), said("the same command", healed), command=("train",)),
]
WRITERS = [
    Row(full, said("free some space", healed), command=("train",)),
]
LOST = [
    Row(
        lambda world: (damaged("none")(world), shutil.rmtree("runs/saved/checkpoints")),
        said("--fresh", afresh),
        command=("train",),
    ),
]
KEPT = [
    Row(
        lambda world: (commands.stopped_sweep(THREE)(world), Path("runs/stopped/sweep.json").unlink()),
        said("restore sweep.json", lambda world: shutil.copy(world.kept / "stopped/sweep.json", "runs/stopped")),
        command=("sweep",),
    ),
]
CURVE = [
    Row(
        lambda world: (
            world.trained("falling", "lr_scheduler={type: linear, end: inclusive}"),
            world.words.extend(["name=falling", "lr_scheduler={type: linear, end: inclusive}"]),
            world.words.extend(["train.max_steps=4", "resume.allow_changes=[train.max_steps]"]),
        ),
        written(),
        command=("train",),
    ),
]


def planned(world: World) -> None:
    world.command = ("train", "--dry-run")


IDENTITY = [
    Row(
        lambda world: (world.trained("run"), world.words.append("optimizer.lr=1e-3")),
        lambda world, problem: world.words.append(re.search(r"'(resume\.\S+)'", str(problem.fix))[1]),  # type: ignore[index]
        command=("train",),
    ),
    Row(
        lambda world: (world.trained("run"), world.words.append("adapter.rank=4")),
        said("set the old values", lambda world: (added("adapter.rank=2")(world), planned(world))),
        command=("train",),
    ),
    Row(
        lambda world: (
            world.trained("run"),
            world.words.extend(["adapter.rank=4", "resume.allow_changes=[adapter.rank]"]),
        ),
        said("another `name`", lambda world: (added("resume.allow_changes=[]", "name=other")(world), planned(world))),
        command=("train",),
    ),
]
ROWS: Mapping[str, Sequence[Row]] = {
    "config/identity.py": IDENTITY,
    "runtime/launch.py": LAUNCH,
    "errors.py": MEMORY,
    "planning/prepare.py": [*CURVE, *LOST],
    "runtime/device.py": DEVICE,
    "storage/atomic_files.py": ATOMIC,
    "storage/checkpoint.py": CHECKPOINTS,
    "storage/disk_space.py": DISK,
    "storage/locks.py": LOCKS,
    "training/fit.py": STOPPED,
    "training/resume.py": KEPT,
    "training/writers.py": WRITERS,
}
