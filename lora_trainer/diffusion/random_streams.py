"""Randomness as a pure function of (seed, purpose, counters): nothing to carry, nothing to save, nothing to disturb.

Each draw has its own Philox generator (Salmon et al. 2011, as in numpy) keyed by a hash of what it is for. So order,
crop, flip, caption, timestep and noise do not depend on device, world size, micro-batch split, worker count or resume,
and sampling or validation cannot move them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream(seed: int, purpose: str, *counters: int | str) -> np.random.Generator:
    """The generator of one purpose at the given counters (epoch, slot, module name ...)."""
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, counters)))


def normal(shape: Sequence[int], seed: int, purpose: str, *counters: int | str) -> torch.Tensor:
    """Standard normal float32 tensor on the CPU."""
    import torch

    return torch.from_numpy(stream(seed, purpose, *counters).standard_normal(tuple(shape), dtype=np.float32))


def uniform(
    low: float, high: float, shape: Sequence[int], seed: int, purpose: str, *counters: int | str
) -> torch.Tensor:
    """Uniform float32 tensor in [low, high) on the CPU."""
    import torch

    unit = stream(seed, purpose, *counters).random(tuple(shape), dtype=np.float32)
    return torch.from_numpy(unit * np.float32(high - low) + np.float32(low))


def torch_seed(seed: int, purpose: str, *counters: int | str) -> int:
    """A 63-bit seed for those few places where torch must draw by itself (adapter dropout)."""
    return _key(seed, purpose, counters) >> 65


def _key(seed: int, purpose: str, counters: Sequence[int | str]) -> int:
    text = "\x1f".join((str(seed), purpose, *map(str, counters)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
