"""What the launcher asked for, read from its environment variables. Never imports torch.

`accelerate launch` and `torchrun` describe the world in the environment. Settings of accelerate that we would not
honour are refused here with both values named, instead of being passed over.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from lora_trainer.config.schema import RunConfig
from lora_trainer.errors import HostError, Problem

_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8"}


@dataclass(frozen=True, slots=True)
class Launch:
    """Place of this process among all."""

    num_processes: int = 1
    rank: int = 0
    local_rank: int = 0
    num_local_processes: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_launch(config: RunConfig) -> Launch:
    """The world as the launcher set it up.

    Raises:
        HostError: accelerate was configured for something that this trainer would not do.
    """
    problems = [*_refused_engines(), *_other_precision(config), *_other_accumulation(config), *_lost_processes()]
    if problems:
        raise HostError(*problems)
    return Launch(
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        num_local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def default_threads(launch: Launch) -> int:
    """Physical cores that this process may use (a container may grant fewer than there are), shared among siblings."""
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    return max(1, cores // launch.num_local_processes)


def _refused_engines() -> list[Problem]:
    fix = "accelerate config: choose no engine; adapters are small, so plain data parallel training serves"
    problems = [
        Problem(f"accelerate is set to use {engine}, which this trainer does not", variable, fix=fix)
        for variable, engine in _ENGINES.items()
        if os.environ.get(variable, "false").lower() == "true"
    ]
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", ""):
        problems.append(
            Problem(
                f"accelerate is set to compile with {backend}, which this trainer does not",
                "ACCELERATE_DYNAMO_BACKEND",
                fix="accelerate launch --dynamo_backend no ...",
            )
        )
    return problems


def _other_precision(config: RunConfig) -> list[Problem]:
    """accelerate's default `no` is taken as unsaid; any other value must agree with ours."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked == "no" or _PRECISIONS.get(asked) == config.train.precision:
        return []
    return [
        Problem(
            f"accelerate says mixed precision {asked}, the config says train.precision: {config.train.precision}",
            "ACCELERATE_MIXED_PRECISION",
            "the precision must have one source",
            f"write train.precision={_PRECISIONS.get(asked, 'bf16')}, or start with --mixed_precision no",
        )
    ]


def _other_accumulation(config: RunConfig) -> list[Problem]:
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    ours = config.train.gradient_accumulation_steps
    if asked in ("1", "auto", str(ours)):
        return []
    return [
        Problem(
            f"accelerate says {asked} gradient accumulation steps, the config says {ours}",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            fix=f"write train.gradient_accumulation_steps={asked}, or remove it from accelerate's config",
        )
    ]


def _lost_processes() -> list[Problem]:
    """`accelerate launch --cpu --num_processes 2` (1.15) starts one process; its leftover MASTER_ADDR tells on it."""
    from_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if not from_accelerate or "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ:
        return []
    command = _parent_command()
    if "MASTER_ADDR" in _parent_environment():  # the user's own, not the launcher's
        return []
    asked = _value_after(command, "--num_processes") or "N"
    return [
        Problem(
            f"accelerate was asked for {asked} processes and started one",
            "accelerate launch --cpu",
            "its CPU launcher only multiplies processes under MPI",
            f"torchrun --nproc_per_node {asked} train.py --config ...",
        )
    ]


def _parent_command() -> list[str]:
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _parent_environment() -> list[str]:
    try:
        rows = Path(f"/proc/{os.getppid()}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []
    return [row.partition("=")[0] for row in rows]


def _value_after(words: list[str], flag: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == flag:
            return following
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return None
