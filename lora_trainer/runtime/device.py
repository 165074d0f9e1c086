"""What a run would compute on, as driver and kernel tell: device, free memory, precision. Never imports torch."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Literal, cast

import psutil

from lora_trainer.errors import Problem, SystemSetupError
from lora_trainer.runtime.launch import control_groups

Precision = Literal["fp32", "bf16", "fp16"]
MIB = 2**20
DRIVER_PATIENCE_S = 20
FIRST_WITH_BF16 = 8.0
"""Compute capability."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the host."""

    name: str
    total_bytes: int
    """0 where it is not told."""
    free_bytes: int
    gpu: str | None = None
    """The driver's name for it; None is the host."""
    has_bf16: bool = True
    why_unused: str | None = None
    """Why torch cannot compute on it."""

    def processes(self) -> list[str]:
        """What holds memory of this GPU, the most first, as far as the driver tells."""
        rows = _ask_driver("compute-apps", "gpu_uuid,pid,process_name,used_memory") if self.gpu else []
        held = sorted(((_number(used), name, pid) for gpu, pid, name, used in rows if gpu == self.gpu), reverse=True)
        return [f"process {pid} ({Path(name).name}) holds {used:,.0f} MiB" for used, name, pid in held]


def find_devices() -> tuple[Device, ...]:
    """The device of this process first; the host and the GPU, where there is one."""
    card, host = _visible_card(), _host()
    if card is None:  # a driver that fails or hangs must not look like a machine without a card
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None or shutil.which("nvidia-smi") is None
        return (host if hidden else replace(host, name=f"{host.name} (nvidia-smi tells of no card)"),)
    return (card, host) if card.why_unused is None else (host, card)


def precision_on(asked: str, device: Device) -> Precision:
    """What `train.precision` means on a device.

    Raises:
        SystemSetupError: the GPU does not have it.
    """
    if asked == "bf16" and not device.has_bf16:
        fix = "write fp16 or auto"
        raise SystemSetupError(Problem("this GPU has no bf16", "train.precision", device.name, fix))
    if asked != "auto":
        return cast(Precision, asked)
    if device.gpu is None:
        return "fp32"
    return "bf16" if device.has_bf16 else "fp16"


def processor_name() -> str:
    """The model's name, or the architecture where the kernel does not say it."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def _host() -> Device:
    """The host; a control group may grant less memory than there is (`docker --memory`)."""
    memory = psutil.virtual_memory()
    limits = [(memory.total, memory.available), *_memory_limits()]
    return Device(processor_name(), *(min(values) for values in zip(*limits, strict=True)))


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and what is left of it, of each control group (v2 or v1) that has one."""
    for group in control_groups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):  # "max" where there is none
                most, now = (int((group / name).read_text()) for name in (limit, used))
                cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
                yield most, max(0, most - now + int(cached[1] if cached else 0))


def _visible_card() -> Device | None:
    """The GPU that this process would get; None where the driver tells of none."""
    rows = _ask_driver("gpu", "index,uuid,name,memory.total,memory.free,compute_cap")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name.strip() for name in visible.split(",")]
        cards = [[row for row in rows if name and (name == row[0] or row[1].startswith(name))] for name in named]
        rows = [row for row, *_ in takewhile(bool, cards)]  # CUDA stops at the first that is none
    place = os.environ.get("LOCAL_RANK", "0")
    if not rows or not place.isdecimal() or int(place) >= len(rows):
        return None
    _, gpu, name, total, free, capability = rows[int(place)]
    why = None if _torch_has_cuda() else "this torch is built without CUDA"
    has_bf16 = _number(capability) >= FIRST_WITH_BF16
    return Device(name, int(_number(total) * MIB), int(_number(free) * MIB), gpu, has_bf16, why)


def _ask_driver(what: str, fields: str) -> list[list[str]]:
    """The rows of a query of nvidia-smi; none where it is not there, fails or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=DRIVER_PATIENCE_S, check=False)  # noqa: S603
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    told = done.stdout.decode(errors="replace").splitlines()  # of the cards that are well, where one is lost
    rows = [[cell.strip() for cell in line.split(",")] for line in told if line.strip()]
    return [row for row in rows if len(row) == fields.count(",") + 1]


def _number(text: str) -> float:
    """0 where the driver does not tell (`[N/A]`)."""
    with suppress(ValueError):
        return number if 0 <= (number := float(text)) < math.inf else 0.0
    return 0.0


def _torch_has_cuda() -> bool:
    """Whether torch is built for GPUs, from its own file of versions, as importing it takes seconds."""
    with suppress(OSError, TypeError, AttributeError):
        versions = (Path(find_spec("torch").origin).parent / "version.py").read_text()  # type: ignore[union-attr, arg-type]
        return re.search(r"^(cuda|hip)\b[^=\n]*= '", versions, re.MULTILINE) is not None
    return False
