"""The two layouts of a LoRA file: kohya's, read by A1111 and ComfyUI, and diffusers'.

An adapter's tensors are named `<component>.<layer>.lora_A.weight`, `... .lora_B.weight` and, with DoRA,
`... .lora_magnitude_vector`; diffusers' layout has these very names.
kohya's file carries the scale as a tensor: alpha / rank is what a reader multiplies
with, so rank stabilisation writes alpha x sqrt(rank) there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

Tensors = dict[str, torch.Tensor]


def to_kohya(
    adapter: Mapping[str, torch.Tensor], names: Mapping[str, Sequence[str]], *, alpha: float, use_rslora: bool
) -> Tensors:
    """kohya's layout: `<name>.lora_down.weight / lora_up.weight / alpha / dora_scale`.

    Layers joined under one name become one of their common rank: their A stand above each other, their B along a
    diagonal, and alpha grows with the rank, so that their updates stay what they were.

    Args:
        names: the layers that stand under each name (`models.family.joined_layers`).
    """
    tensors: Tensors = {}
    for name, layers in names.items():
        downs, ups = ([adapter[f"{layer}.lora_{kind}.weight"] for layer in layers] for kind in "AB")
        rank = downs[0].shape[0]
        written = alpha * math.sqrt(rank) if use_rslora else alpha
        tensors[f"{name}.lora_down.weight"] = torch.cat(downs)
        tensors[f"{name}.lora_up.weight"] = ups[0] if len(ups) == 1 else torch.block_diag(*ups)
        tensors[f"{name}.alpha"] = torch.tensor(written * len(layers), dtype=torch.float32)
        magnitudes = [own for layer in layers if (own := adapter.get(f"{layer}.lora_magnitude_vector")) is not None]
        if magnitudes:
            tensors[f"{name}.dora_scale"] = torch.cat([_dora_scale(own) for own in magnitudes])
    return tensors


def from_kohya(
    tensors: Mapping[str, torch.Tensor], names: Mapping[str, Sequence[str]], num_outputs: Mapping[str, int]
) -> Tensors:
    """The inverse of `to_kohya`.

    Args:
        names: as there; it may hold more than the file.
        num_outputs: outputs of each layer.
    """
    adapter: Tensors = {}
    for name in sorted({key.partition(".")[0] for key in tensors}):
        layers = names[name]
        outputs = [num_outputs[layer] for layer in layers]
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        rank = down.shape[0] // len(layers)
        for index, (layer, rows) in enumerate(zip(layers, up.split(outputs), strict=True)):
            ranks = slice(index * rank, (index + 1) * rank)
            adapter[f"{layer}.lora_A.weight"] = down[ranks]
            adapter[f"{layer}.lora_B.weight"] = rows[:, ranks]
        if (scale := tensors.get(f"{name}.dora_scale")) is not None:
            shape = (1, -1, 1, 1) if down.dim() == 4 else (-1,)
            for layer, own in zip(layers, scale.split(outputs), strict=True):
                adapter[f"{layer}.lora_magnitude_vector"] = own.reshape(shape)
    return adapter


def _dora_scale(magnitude: torch.Tensor) -> torch.Tensor:
    """One number per output, shaped to be multiplied with the weight: [out, 1] or [out, 1, 1, 1]."""
    return magnitude.reshape(-1, 1, 1, 1) if magnitude.dim() == 4 else magnitude.reshape(-1, 1)
