"""What the launcher asked for, read from its environment variables. Never imports torch.

`accelerate launch` and `torchrun` describe the world in the environment. Settings of accelerate that we would not
honour are refused here with both values named, instead of being passed over.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lora_trainer.config.schema import RunConfig, TrainConfig
from lora_trainer.errors import Problem, SystemSetupError

_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_COMPILER = "ACCELERATE_DYNAMO_BACKEND"
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_WORLD = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1}
"""Variables of torchrun, with what a plain start would say."""
_PLACES = (*_WORLD, "LOCAL_RANK", "MASTER_PORT")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""What accelerate would take for the number of processes."""
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Launch:
    """Place of this process among all."""

    num_processes: int = 1
    rank: int = 0
    num_local_processes: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_launch(config: RunConfig) -> Launch:
    """The world as the launcher set it up.

    Raises:
        SystemSetupError: accelerate was configured for something that this trainer would not do.
    """
    places = [*_contradicting_places()]
    if problems := [*places, *_refused_engines(), *_contradictions(config.train), *_lost_processes()]:
        raise SystemSetupError(*problems)
    return Launch(*(int(os.environ.get(name) or default) for name, default in _WORLD.items()))


def forget_launcher() -> None:
    """Leave nothing in the environment of a process that is alone from which libraries would think it is not."""
    for name in ("LOCAL_RANK", *_MPI_SIZES):
        os.environ.pop(name, None)


def default_threads(launch: Launch) -> int:
    """Physical cores that this process may use (a container may grant fewer than there are), shared among siblings."""
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)), cpu_quota())
    return max(1, int(cores) // launch.num_local_processes)


def cpu_quota() -> float:
    """CPUs that the quotas of this process's control groups (v2 or v1) grant, as `docker --cpus`; inf without one."""
    return min(map(_quota_of, control_groups("cpu")), default=math.inf)


def control_groups(controller: str) -> Iterator[Path]:
    """The folder of each control group (v2 or v1) of this process that may limit it, and all above it."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                group = CGROUPS / (controller if controllers else "") / path.lstrip("/")
                yield from (group, *group.parents)


def _quota_of(group: Path) -> float:
    with suppress(OSError, ValueError, ZeroDivisionError):
        if (group / "cpu.max").is_file():
            quota, period = map(float, (group / "cpu.max").read_text().split())  # "max" where there is none
        else:
            quota, period = (float((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else math.inf  # -1 where there is none
    return math.inf


def _contradicting_places() -> Iterator[Problem]:
    """What a launcher, or a shell that once was inside one, says of this process's place among others."""
    said = {name: os.environ[name] for name in (*_PLACES, *_MPI_SIZES) if os.environ.get(name)}
    where = ", ".join(f"{name}={value}" for name, value in said.items())
    fix = f"start with torchrun --nproc-per-node N train.py --config ..., or alone: unset {' '.join(said)}"
    if not all(value.isascii() and value.isdecimal() for value in said.values()):
        yield Problem("a launcher's variable is no whole number", where, fix=fix)
        return
    numbers = {name: int(value) for name, value in said.items()}
    world, rank, num_local = (numbers.get(name, default) for name, default in _WORLD.items())
    least_local = num_local if "LOCAL_WORLD_SIZE" in said else world
    if not (rank < world and num_local <= world and numbers.get("LOCAL_RANK", 0) < least_local):
        yield Problem("the launcher's variables contradict each other", where, fix=fix)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and missing:
        why = f"without {', '.join(missing)} they cannot find each other"
        yield Problem(f"{world} processes are announced", where, why, fix)
    if (num_mpi := max(numbers.get(name, 1) for name in _MPI_SIZES)) > 1 and world != num_mpi:
        why = "each would train the whole run and write the same files"
        yield Problem(f"MPI started {num_mpi} processes, which this trainer does not join", where, why, fix)


def _refused_engines() -> Iterator[Problem]:
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            fix = "accelerate config: choose no engine; adapters are small, so plain data parallel training serves"
            yield Problem(f"accelerate is set to use {engine}, which this trainer does not", variable, fix=fix)
    backend = os.environ.get(_COMPILER, "no").lower()
    if backend not in ("no", ""):
        what = f"accelerate is set to compile with {backend}, which this trainer does not"
        yield Problem(what, _COMPILER, fix="accelerate launch --dynamo_backend no ...")


def _contradictions(train: TrainConfig) -> Iterator[Problem]:
    """accelerate's default precision `no` is taken as unsaid; any other value must agree with ours."""
    precision = os.environ.get(_PRECISION, "no").lower()
    if precision != "no" and precision != train.precision:
        what = f"accelerate says mixed precision {precision}, the config says train.precision: {train.precision}"
        ours = f"write train.precision={precision}, or " if precision in ("fp16", "bf16") else ""
        fix = f"{ours}start with --mixed_precision no"
        yield Problem(what, _PRECISION, "the precision must have one source", fix)
    steps, own = os.environ.get(_ACCUMULATION, "1"), train.gradient_accumulation_steps
    if steps not in ("1", "auto", str(own)):
        what = f"accelerate says {steps} gradient accumulation steps, the config says {own}"
        write = f"write train.gradient_accumulation_steps={steps}, or " if steps.isdecimal() and int(steps) else ""
        fix = f"{write}unset {_ACCUMULATION}, which accelerate's config sets"
        yield Problem(what, _ACCUMULATION, fix=fix)


def _lost_processes() -> list[Problem]:
    """`accelerate launch --cpu --num_processes 2` (1.15) starts one process; its leftover MASTER_ADDR tells on it."""
    if _PRECISION not in os.environ or "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ:
        return []
    command, environment = _launcher()
    if "MASTER_ADDR" in environment:  # the user's own, not the launcher's
        return []
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--num_processes", nargs="?", default="N", const="N")
    num_processes = option.parse_known_args(command)[0].num_processes
    what = f"accelerate was asked for {num_processes} processes and started one"
    why = "its CPU launcher only multiplies processes under MPI"
    fix = f"torchrun --nproc_per_node {num_processes} train.py --config ..."
    return [Problem(what, "accelerate launch --cpu", why, fix)]


def _launcher() -> tuple[list[str], Collection[str]]:
    """Command line and environment variables of the process that started this one, as far as they can be read."""
    try:
        parent = psutil.Process(os.getppid()).as_dict(["cmdline", "environ"], ad_value=[])
    except psutil.NoSuchProcess:  # it is outside of this container
        return [], []
    return parent["cmdline"], parent["environ"]
