"""The two layouts of a LoRA file: kohya's, read by A1111 and ComfyUI, and diffusers'.

An adapter's tensors are named `<component>.<layer>.lora_A.weight`, `... .lora_B.weight` and, with DoRA,
`... .lora_magnitude_vector`; diffusers' layout has these very names.
kohya's file carries the scale as a tensor: alpha / rank is what a reader multiplies
with, so rank stabilisation writes alpha x sqrt(rank) there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

Tensors = dict[str, torch.Tensor]
_KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def to_kohya(
    adapter: Mapping[str, torch.Tensor], *, prefixes: Mapping[str, str], alpha: float, use_rslora: bool
) -> Tensors:
    """kohya's layout: `lora_unet_<layer with _>.lora_down.weight / lora_up.weight / alpha / dora_scale`.

    Args:
        prefixes: what stands for each component.
    """
    tensors: Tensors = {}
    for key, tensor in adapter.items():
        layer, kind = _split(key)
        name = kohya_name(layer, prefixes)
        if kind == "lora_magnitude_vector":
            tensors[f"{name}.dora_scale"] = _dora_scale(tensor)
            continue
        tensors[f"{name}.{_KOHYA[kind]}"] = tensor
        if kind == "lora_A.weight":
            rank = tensor.shape[0]
            written = alpha * math.sqrt(rank) if use_rslora else alpha
            tensors[f"{name}.alpha"] = torch.tensor(written, dtype=torch.float32)
    return tensors


def from_kohya(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, str]) -> Tensors:
    """The adapter of a file in kohya's layout; `layers` gives the layer of each kohya name."""
    names = {
        "lora_down.weight": "lora_A.weight",
        "lora_up.weight": "lora_B.weight",
        "dora_scale": "lora_magnitude_vector",
    }
    adapter: Tensors = {}
    for key, tensor in tensors.items():
        name, _, kind = key.partition(".")
        if kind == "alpha":
            continue
        layer = layers[name]
        if kind == "dora_scale":
            down = tensors[f"{name}.lora_down.weight"]
            tensor = tensor.reshape(1, -1, 1, 1) if down.dim() == 4 else tensor.reshape(-1)
        adapter[f"{layer}.{names[kind]}"] = tensor
    return adapter


def kohya_name(layer: str, prefixes: Mapping[str, str]) -> str:
    """`lora_unet_down_blocks_0_...` of a layer named with its component."""
    component, _, rest = layer.partition(".")
    return f"{prefixes[component]}_{rest.replace('.', '_')}"


def kohya_names(layers: Iterable[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """The layer of each kohya name: the dots that became underscores cannot be told back otherwise."""
    return {kohya_name(layer, prefixes): layer for layer in layers}


def _split(key: str) -> tuple[str, str]:
    """`<layer>` and the kind of tensor of a peft name."""
    layer, _, kind = key.rpartition(".lora_")
    return layer, f"lora_{kind}"


def _dora_scale(magnitude: torch.Tensor) -> torch.Tensor:
    """One number per output, shaped to be multiplied with the weight: [out, 1] or [out, 1, 1, 1]."""
    return magnitude.reshape(-1, 1, 1, 1) if magnitude.dim() == 4 else magnitude.reshape(-1, 1)
