"""What the launcher asked for, read from its environment variables. Never imports torch.

`accelerate launch` and `torchrun` describe the world in the environment. Settings of accelerate that we would not
honour are refused here with both values named, instead of being passed over.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import psutil

from lora_trainer.config.schema import RunConfig, TrainConfig
from lora_trainer.errors import HostError, Problem

_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_COMPILER = "ACCELERATE_DYNAMO_BACKEND"
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_WORLD = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1"}


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
        HostError: accelerate was configured for something that this trainer would not do.
    """
    if problems := [*_refused_engines(), *_contradictions(config.train), *_lost_processes()]:
        raise HostError(*problems)
    return Launch(*(int(os.environ.get(name, default)) for name, default in _WORLD.items()))


def default_threads(launch: Launch) -> int:
    """Physical cores that this process may use (a container may grant fewer than there are), shared among siblings."""
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    return max(1, cores // launch.num_local_processes)


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
        known = precision if precision in ("fp16", "bf16", "fp8") else "bf16"
        fix = f"write train.precision={known}, or start with --mixed_precision no"
        yield Problem(what, _PRECISION, "the precision must have one source", fix)
    steps, ours = os.environ.get(_ACCUMULATION, "1"), train.gradient_accumulation_steps
    if steps not in ("1", "auto", str(ours)):
        what = f"accelerate says {steps} gradient accumulation steps, the config says {ours}"
        fix = f"write train.gradient_accumulation_steps={steps}, or remove it from accelerate's config"
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
