"""The machine side of a run: processes, device, precision, threads, and what to write down about them."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import signal
import socket
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils import reduce as reduce_over_processes

from lora_trainer import __version__
from lora_trainer.errors import OutOfMemory, Problem, SystemSetupError, refused_memory
from lora_trainer.runtime.device import Device, Precision, precision_on, processor_name
from lora_trainer.runtime.launch import Launch, forget_launcher

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")
_PR_SET_PDEATHSIG = 1
_peers: list[tuple[int, int, str]] = []
"""Rank, process id and host of all that joined."""


@dataclass(frozen=True)
class Runtime:
    """Where and how tensors are computed in this process."""

    launch: Launch
    device: torch.device
    precision: Precision
    threads: int
    state: PartialState

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen base and of the forward pass."""
        return _DTYPES[self.precision]

    def autocast(self) -> Any:
        """Matrix products in the run's precision; nothing at fp32."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, dtype=self.dtype)

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes; the tensor itself for one."""
        with _peers_in_words():
            return values if self.launch.num_processes == 1 else reduce_over_processes(values, "sum")

    def from_all(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        with _peers_in_words():
            return values if self.launch.num_processes == 1 else gather_object(values)

    def wait_for_all(self) -> None:
        """Go on when every process has come here."""
        with _peers_in_words():
            self.state.wait_for_everyone()

    def facts(self) -> dict[str, str]:
        """What may move the last bits of a run: device, precision as it became, versions (`config/identity.py`)."""
        packages = {name: metadata.version(name) for name in ("torch", "diffusers", "peft", "accelerate")}
        return {"device": self.device_name, "train.precision": self.precision, **packages}

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the GPU where it takes under a tenth of the memory that is free there; pinned on the host otherwise."""
        if self.device.type != "cuda":
            return tensor
        return tensor.to(self.device) if tensor.nbytes < self.free_bytes() // 10 else tensor.pin_memory()

    def free_cached_memory(self) -> None:
        """Give back the memory of models that nobody holds any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """Memory that is free now: of the GPU where there is one, else of the host."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available

    @contextmanager
    def refusals(self) -> Iterator[list[str]]:
        """What memory is refused inside the block ends the block and is told in the list; what it held is freed."""
        told: list[str] = []
        try:
            yield told
        except Exception as error:
            if (asked := refused_memory(error)) is None:
                raise
            peak, free = self.peak_memory_gib(), self.free_bytes() / 2**30
            told.append(f"{asked} on {self.device_name}; peak so far {peak:.2f} GiB, free now {free:.2f} GiB")
            traceback.clear_frames(error.__traceback__)

    @contextmanager
    def phase(self, name: str, *, together: bool = False) -> Iterator[None]:
        """Memory that is refused inside the block is told as that of a phase of `planning/saving.py`.

        Args:
            together: all processes go through this block and meet at its end, none inside of it.

        Raises:
            OutOfMemory: in this process, or together in all where any was refused.
        """
        with self.refusals() as told:
            yield
        self.raise_refusal(name, self.from_all(told) if together else told)

    def raise_refusal(self, phase: str, told: Sequence[str]) -> None:
        """End a phase in which memory was refused, if it was."""
        if told:
            self.free_cached_memory()
            raise OutOfMemory(phase, told[0])

    def peak_memory_gib(self) -> float:
        """Highest memory of this process so far: of the GPU where there is one, else of the host."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def from_main(launch: Launch, value: Any) -> Any:
    """The main process's value, in every process; they must have joined."""
    with _peers_in_words():
        return value if launch.num_processes == 1 else broadcast_object_list([value])[0]


@contextmanager
def _peers_in_words() -> Iterator[None]:
    """The end of another process, as this one notices it.

    Raises:
        SystemSetupError: it names the processes of this host that are gone.
    """
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower() and not isinstance(error, torch.distributed.DistError):
            raise
        gone = [str(rank) for rank, pid, host in _peers if host == socket.gethostname() and not _lives(pid)]
        which = f"the process of rank {', '.join(gone)} has ended" if gone else "another process can no longer be heard"
        fix = "its own last words say why; the same command goes on from the newest checkpoint"
        raise SystemSetupError(Problem(f"{which}, so this one ends too", fix=fix)) from error


def _lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def joined_processes(launch: Launch) -> Iterator[PartialState]:
    """Join the other processes; leave them in order at the end. Only once per process: a second time is unreliable.

    Raises:
        SystemSetupError: not all announced processes found each other.
    """
    _die_with_launcher()
    if launch.num_processes == 1:
        forget_launcher()
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != launch.num_processes:
        what = f"{launch.num_processes} processes are announced, and {state.num_processes} found each other"
        why = "each process would train on a part of the images and none would hear of the others"
        fix = "start with torchrun --nproc-per-node N train.py --config ..., or unset WORLD_SIZE"
        raise SystemSetupError(Problem(what, "WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR", why, fix))
    if launch.num_processes > 1:
        with _peers_in_words():
            _peers[:] = gather_object([(launch.rank, os.getpid(), socket.gethostname())])
    try:
        yield state
    finally:
        state.destroy_process_group()


@contextmanager
def start_runtime(
    launch: Launch, precision: str, threads: int, joined: PartialState | None = None
) -> Iterator[Runtime]:
    """Set threads and precision, and join the other processes for as long as the block lasts.

    Args:
        joined: the processes where they are joined already, for several runs in a row.

    Raises:
        SystemSetupError: the precision asked for does not exist on this device, or processes are missing.
    """
    torch.set_num_threads(threads)
    with joined_processes(launch) if joined is None else nullcontext(joined) as state:
        yield Runtime(launch, state.device, choose_precision(precision, state.device), threads, state)


def environment_report(runtime: Runtime) -> dict[str, Any]:
    """Versions and hardware: what another person needs to repeat the run. No host or user names."""
    return {
        "python": platform.python_version(),
        "platform": platform.system() + " " + platform.machine(),
        "packages": {"lora_trainer": __version__} | {name: metadata.version(name) for name in _PACKAGES},
        "device": processor_name() if runtime.device.type == "cpu" else runtime.device_name,
        "num_processes": runtime.launch.num_processes,
        "precision": runtime.precision,
        "threads": runtime.threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def choose_precision(asked: str, device: torch.device) -> Precision:
    """What `train.precision` means on a device.

    Raises:
        SystemSetupError: the device does not have it.
    """
    if device.type == "cpu":
        return precision_on(asked, Device("cpu", 0, 0))
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return precision_on(asked, Device(torch.cuda.get_device_name(device), 0, 0, str(device), has_bf16))


def _die_with_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher dies: `accelerate launch` passes no signal on.

    Only under a launcher: a run started from a shell must outlive the shell's end where the user wants that (nohup).
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
