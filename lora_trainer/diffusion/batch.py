"""What flows through one micro-step, and the legend of the shape suffixes used in this package.

B images of a micro-batch, C latent channels, h x w latent height and width (pixels / VAE factor), L tokens, D text
width, P trials of one packed pass, K trials in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Slot(NamedTuple):
    """One place of a sample in an epoch: the key of all its random draws."""

    epoch: int
    position: int


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the denoiser is told beside the noisy latents: tensors [B, ...] of the prompt and the view, by name."""

    tensors: Mapping[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def tiled(self, copies: int) -> Conditioning:
        """The same, once for each of so many trials: [P*B, ...]."""
        return Conditioning({name: tile(values, copies) for name, values in self.tensors.items()})

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The same in another dtype."""
        return Conditioning({name: values.to(dtype) for name, values in self.tensors.items()})


@dataclass(frozen=True, slots=True)
class Batch:
    """The clean side of a micro-step, on the device; `slots` and `files` name each image."""

    latents_BChw: torch.Tensor
    conditioning: Conditioning
    slots: tuple[Slot, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProbeItems:
    """Images on which a loss is measured again and again: their mean latents and captions, fixed for the run."""

    keys: tuple[str, ...]
    """Content hash of each image: the key of its noise."""
    latents_NChw: torch.Tensor
    view_tensors: Mapping[str, torch.Tensor]
    """[N, ...] by name: what the denoiser is told of each view."""
    prompts: tuple[str, ...]


def tile(values: torch.Tensor, copies: int) -> torch.Tensor:
    """[B, ...] -> [P*B, ...], one copy after the other; the tensor itself for one."""
    return values if copies == 1 else values.repeat(copies, *[1] * (values.dim() - 1))
