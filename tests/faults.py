"""What befalls a run on purpose: numbers that are not finite in chosen updates of chosen trials, a stop,
and a disk or a device that refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_trainer.cli import train as train_command
from lora_trainer.storage import atomic_files
from lora_trainer.training.denoiser import AdaptedDenoiser
from lora_trainer.training.optimizer_step import OptimizerStep


def stop_after(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """Let the next run be told to stop during update `num_steps`."""

    class Stop(train_command.StopRequest):
        polls = 0

        def __call__(self) -> bool:
            self.polls += 1
            return self.polls >= num_steps

    monkeypatch.setattr(train_command, "StopRequest", Stop)


def refusing(operation: str, name: str, error: int) -> atomic_files.Observer:
    """Refuse an operation on every path whose name holds `name`."""

    def observe(moment: str, seen: str, path: Path) -> None:
        if moment == "before" and seen == operation and name in path.name:
            raise OSError(error, "refused", str(path))

    return observe


def before_updates(monkeypatch: pytest.MonkeyPatch, change: Callable[[OptimizerStep, int], None]) -> None:
    """Call `change` with the optimizer step and k before each update k."""
    honest = OptimizerStep.run

    def run(self: OptimizerStep, k: int, **named: Any) -> Any:
        change(self, k)
        return honest(self, k, **named)

    monkeypatch.setattr(OptimizerStep, "run", run)


def spoil_gradients(
    monkeypatch: pytest.MonkeyPatch, updates: Collection[int], *, trial: str | None = None, value: float = float("nan")
) -> None:
    """Multiply a gradient of one trial (by name; the first where it has none) by `value` in these updates."""
    hooks: list[torch.utils.hooks.RemovableHandle] = []

    def spoil(step: OptimizerStep, k: int) -> None:
        while hooks:
            hooks.pop().remove()
        if k in updates:
            own = next(each for each in step.trials if trial in (None, each.name))
            parameter = next(iter(own.parameters.values()))
            hooks.append(parameter.register_hook(lambda gradient: gradient * value))

    before_updates(monkeypatch, spoil)


def spoil_losses(monkeypatch: pytest.MonkeyPatch, calls: Callable[[int], bool] | Sequence[int]) -> None:
    """Make the losses of these forwards, counted from 0, NaN."""
    honest, count = AdaptedDenoiser.squared_errors, iter(range(10**6))
    is_spoilt = calls if callable(calls) else set(calls).__contains__

    def squared_errors(self: AdaptedDenoiser, *arguments: Any) -> torch.Tensor:
        return honest(self, *arguments) * (float("nan") if is_spoilt(next(count)) else 1.0)

    monkeypatch.setattr(AdaptedDenoiser, "squared_errors", squared_errors)


class _Refusing(TorchDispatchMode):
    """Refuse the memory for one of the next tensors."""

    def __init__(self, operation: int) -> None:
        super().__init__()
        self._left = operation

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")
        return function(*args, **kwargs or {})


def refuse_memory(
    monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str], *, call: int = 0, operation: int = 0
) -> None:
    """Be a device that refuses memory in one call of a function, counted from 0, at one of its operations."""
    owner, name = place
    honest, calls = getattr(owner, name), itertools.count()

    def refusing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) != call:
            return honest(*args, **kwargs)
        with _Refusing(operation):
            return honest(*args, **kwargs)

    monkeypatch.setattr(owner, name, refusing)
