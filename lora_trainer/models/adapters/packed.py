"""Several adapters at once on one frozen base: one forward over a batch that holds every trial's copy of the images.

The batch is trial-major, [P*B, ...]: the frozen layers see one large batch, and each adapted layer adds, by batched
matrix products, adapter p to the rows of trial p. Trials share no parameter, and no layer of the base mixes samples, so
the gradients of a sum over trials are those of separate runs (the idea of mLoRA, arXiv:2312.02515, made exact).

Adapters of other ranks are filled up with zeros inside the forward only: padded rows of A meet padded columns of B, so
they change nothing and get no gradient. peft's own forward is the oracle in the tests.

P trials, B images, M rows of a trial (images x positions), R the largest rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

Forward = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def acting(forwards: Mapping[LoraLayer, Forward]) -> Iterator[None]:
    """Let the layers run so inside the block: forward and, with gradient checkpointing, backward."""
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in forwards:
            del layer.forward  # the class's own again


def packed_forward(layer: LoraLayer, names: Sequence[str]) -> Forward:
    """What stands for a peft layer's own forward where these adapters act at once."""
    base = layer.get_base_layer()
    if not any(name in layer.lora_A for name in names):
        return base
    packed = _Packed(layer, names)
    return packed.linear if isinstance(base, nn.Linear) else packed.conv2d


class _Packed:
    """One layer's adapters, in the order of the trials; a trial that does not adapt this layer has rank 0 in it."""

    def __init__(self, layer: LoraLayer, names: Sequence[str]) -> None:
        self.base = layer.get_base_layer()
        self.num_trials = len(names)
        known = next(name for name in names if name in layer.lora_A)
        some_a, some_b = layer.lora_A[known].weight.detach(), layer.lora_B[known].weight.detach()
        self.down = [layer.lora_A[name].weight if name in layer.lora_A else some_a[:0] for name in names]
        self.up = [layer.lora_B[name].weight if name in layer.lora_B else some_b[:, :0] for name in names]
        self.rank = max(weight.shape[0] for weight in self.down)
        scales = [layer.scaling.get(name, 0.0) for name in names]  # alpha / rank
        self.scale_P11 = torch.tensor(scales, dtype=some_b.dtype, device=some_b.device)[:, None, None]

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A as [P, R, I, *kernel] and scale x B as [P, O, R], filled up with zeros to the largest rank."""
        # rank 4 beside rank 16 on 320 inputs: 12 x 320 = 4 K zeros, 15 KiB in fp32, instead of a launch of its own
        a_PRI = torch.stack([_filled(weight, 0, self.rank) for weight in self.down])
        b_POR = torch.stack([_filled(weight.flatten(1), 1, self.rank) for weight in self.up])
        return a_PRI, b_POR * self.scale_P11  # the scale goes on B, 5 K numbers a trial, not on the output's 2.6 M

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """[P*B, ..., I] -> [P*B, ..., O]: the base layer's output with each trial's adapter added to its rows."""
        # A query of SD 1.5 at 512 px, P = 4, B = 2, R = 16: x is [8, 4096, 320], M = 2 x 4096 = 8192. The frozen layer
        # writes 10.5 M numbers (40 MiB in fp32), u 0.5 M (2 MiB); A and B are 20 K each. The adapters cost R (I + O) of
        # I O = 10 % of its operations, in two launches for all trials where peft needs two for each.
        result = self.base(x)
        a_PRI, scaled_POR = self.stacked()
        u_PMR = torch.bmm(x.reshape(self.num_trials, -1, x.shape[-1]), a_PRI.transpose(1, 2))
        out_PMO = result.reshape(self.num_trials, -1, result.shape[-1])
        # baddbmm adds with no product kept between
        return torch.baddbmm(out_PMO, u_PMR, scaled_POR.transpose(1, 2)).reshape(result.shape)

    def conv2d(self, x: torch.Tensor) -> torch.Tensor:
        """[P*B, I, H, W] -> [P*B, O, H', W']: the trials are the groups of one grouped convolution."""
        base, p = self.base, self.num_trials
        result = base(x)
        a_PRIkk, scaled_POR = self.stacked()
        # one copy of the input: at 320 channels of 64 x 64, P = 4, B = 2 it is [2, 1280, 64, 64], 40 MiB in fp32
        by_image = x.unflatten(0, (p, -1)).transpose(0, 1).flatten(1, 2)  # [B, P*I, H, W]
        u = functional.conv2d(by_image, a_PRIkk.flatten(0, 1), None, base.stride, base.padding, base.dilation, groups=p)
        # B is 1 x 1, so one matrix product gives [P, B, O, M], the output's layout: no permuted copy of it
        u_PBRM = u.flatten(2).unflatten(1, (p, -1)).transpose(0, 1)
        return result + torch.matmul(scaled_POR[:, None], u_PBRM).reshape(result.shape)


def _filled(weight: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The weight with zeros appended along `dim` up to `size`."""
    if weight.shape[dim] == size:
        return weight
    return functional.pad(weight, [0, 0] * (weight.dim() - 1 - dim) + [0, size - weight.shape[dim]])
