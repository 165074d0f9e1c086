"""Several adapters at once on one frozen base: one forward over a batch that holds every trial's copy of the images.

The batch is trial-major, [P*B, ...]: the frozen layers see one large batch, and each adapted layer adds, by batched
matrix products, adapter p to the rows of trial p. Trials share no parameter, and no layer of the base mixes samples, so
the gradients of a sum over trials are those of separate runs (the idea of mLoRA, arXiv:2312.02515, made exact).

Adapters of other ranks are filled up with zeros inside the forward only: padded rows of A meet padded columns of B, so
they change nothing and get no gradient. peft's own forward is the oracle in the tests.

P trials, B images, M rows of a trial (images x positions), R the largest rank, I inputs, O outputs.
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional


class PackedForward:
    """The forward of a list of peft layers with the same P adapters, put in the place of peft's own."""

    def __init__(self, layers: Sequence[LoraLayer], names: Sequence[str]) -> None:
        self._packed: list[tuple[LoraLayer, _Packed]] = []
        self._others: list[LoraLayer] = []
        for layer in layers:
            if any(name in layer.lora_A for name in names):
                is_linear = isinstance(layer.get_base_layer(), nn.Linear)
                self._packed.append((layer, (_PackedLinear if is_linear else _PackedConv2d)(layer, names)))
            else:
                self._others.append(layer)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let the layers run packed inside the block: forward and, with gradient checkpointing, backward."""
        for layer, packed in self._packed:
            layer.forward = packed.forward
        for layer in self._others:
            layer.forward = types.MethodType(_base_alone, layer)
        try:
            yield
        finally:
            for layer in (*(layer for layer, _ in self._packed), *self._others):
                del layer.forward  # the class's own again


class _Packed(ABC):
    """One layer's adapters, in the order of the trials; None where a trial does not adapt this layer."""

    def __init__(self, layer: LoraLayer, names: Sequence[str]) -> None:
        self.base = layer.get_base_layer()
        self.num_trials = len(names)
        held = [name if name in layer.lora_A else None for name in names]
        self.down = [None if name is None else layer.lora_A[name].weight for name in held]
        self.up = [None if name is None else layer.lora_B[name].weight for name in held]
        self.scales = [0.0 if name is None else layer.scaling[name] for name in held]
        self.rank = max(weight.shape[0] for weight in self.down if weight is not None)
        self._scale_P11: torch.Tensor | None = None

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's output with each trial's adapter added to its rows."""

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A as [P, R, I, *kernel] and B as [P, O, R], filled up with zeros to the largest rank."""
        # rank 4 beside rank 16 on 320 inputs: 12 x 320 = 4 K zeros, 15 KiB in fp32, instead of a launch of its own
        a = [None if weight is None else _filled(weight, 0, self.rank) for weight in self.down]
        b = [None if weight is None else _filled(weight.flatten(1), 1, self.rank) for weight in self.up]
        return _stack(a), _stack(b)

    def trial_scales(self, like: torch.Tensor) -> torch.Tensor:
        """alpha / rank of each trial, in the dtype and on the device of the weights."""
        if self._scale_P11 is None or self._scale_P11.dtype != like.dtype or self._scale_P11.device != like.device:
            self._scale_P11 = torch.tensor(self.scales, dtype=like.dtype, device=like.device)[:, None, None]
        return self._scale_P11


class _PackedLinear(_Packed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[P*B, ..., I] -> [P*B, ..., O]."""
        # A query of SD 1.5 at 512 px, P = 4, B = 2, R = 16: x is [8, 4096, 320], M = 2 x 4096 = 8192. The frozen layer
        # writes 10.5 M numbers (40 MiB in fp32), u 0.5 M (2 MiB); A and B are 20 K each. The adapters cost R (I + O) of
        # I O = 10 % of its operations, in two launches for all trials where peft needs two for each.
        result = self.base(x)
        a_PRI, b_POR = self.stacked()
        u_PMR = torch.bmm(x.reshape(self.num_trials, -1, x.shape[-1]), a_PRI.transpose(1, 2))
        out_PMO = result.reshape(self.num_trials, -1, result.shape[-1])
        # the scale goes on B, 5 K numbers a trial, not on the output's 2.6 M; baddbmm adds with no product kept between
        scaled_PRO = (b_POR * self.trial_scales(b_POR)).transpose(1, 2)
        return torch.baddbmm(out_PMO, u_PMR, scaled_PRO).reshape(result.shape)


class _PackedConv2d(_Packed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[P*B, I, H, W] -> [P*B, O, H', W']: the trials are the groups of one grouped convolution."""
        result, p = self.base(x), self.num_trials
        a_PRIkk, b_POR = self.stacked()
        # one copy of the input: at 320 channels of 64 x 64, P = 4, B = 2 it is [2, 1280, 64, 64], 40 MiB in fp32
        by_image = x.unflatten(0, (p, -1)).transpose(0, 1).flatten(1, 2)  # [B, P*I, H, W]
        base = self.base
        u = functional.conv2d(by_image, a_PRIkk.flatten(0, 1), None, base.stride, base.padding, base.dilation, groups=p)
        # B is 1 x 1, so one matrix product gives [P, B, O, M], the output's layout: no permuted copy of it
        u_PBRM = u.flatten(2).unflatten(1, (p, -1)).transpose(0, 1)
        scaled_P1OR = (b_POR * self.trial_scales(b_POR))[:, None]
        return result + torch.matmul(scaled_P1OR, u_PBRM).reshape(result.shape)


def _base_alone(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    return layer.base_layer(x)


def _filled(weight: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The weight with zeros appended along `dim` up to `size`."""
    missing = size - weight.shape[dim]
    if not missing:
        return weight
    shape = [*weight.shape]
    shape[dim] = missing
    return torch.cat([weight, weight.new_zeros(shape)], dim)


def _stack(weights: Sequence[torch.Tensor | None]) -> torch.Tensor:
    known = next(weight for weight in weights if weight is not None)
    return torch.stack([torch.zeros_like(known) if weight is None else weight for weight in weights])
