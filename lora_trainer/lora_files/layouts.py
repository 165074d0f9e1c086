"""The two layouts of a LoRA file, tensors and header: kohya's, read by A1111 and ComfyUI, and diffusers'.

An adapter's tensors are named `<component>.<layer>.lora_A.weight`, `... .lora_B.weight` and, with DoRA,
`... .lora_magnitude_vector`; diffusers' layout has these very names. kohya's file carries the scale as a tensor:
alpha / rank is what a reader multiplies with, so rank stabilisation writes alpha x sqrt(rank) there. The headers are a
recipe in the words of those who read them: kohya's ss_* fields, ModelSpec, peft's configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_trainer.lora_files.recipe import OWN_KEY, Recipe
from lora_trainer.models.adapters.bank import peft_config, plain_number
from lora_trainer.storage.safetensors_io import Tensors

ADAPTER_KEY = "lora_adapter_metadata"  # where diffusers looks for alpha and rank stabilisation
_PREDICTION_TYPES = {"v_prediction": "v", "flow": "flow_matching"}  # in ModelSpec's words


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
        if f"{layers[0]}.lora_magnitude_vector" in adapter:  # one number per output, shaped to multiply the weight
            magnitudes = torch.cat([adapter[f"{layer}.lora_magnitude_vector"].flatten() for layer in layers])
            tensors[f"{name}.dora_scale"] = magnitudes.reshape((-1, 1, 1, 1) if downs[0].dim() == 4 else (-1, 1))
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
            for layer, magnitude in zip(layers, scale.split(outputs), strict=True):
                adapter[f"{layer}.lora_magnitude_vector"] = magnitude.reshape(shape)
    return adapter


def kohya_metadata(recipe: Recipe, payload_sha256: str, *, adapts_kernels: bool) -> dict[str, str]:
    """The header of a file in kohya's layout; all values are strings, as the format wants.

    Args:
        adapts_kernels: whether convolutions larger than 1 x 1 have adapters.
    """
    adapter, base, loop, data = recipe.adapter, recipe.base, recipe.loop, recipe.data
    alpha = plain_number(adapter.alpha)
    network_args = {"conv_dim": adapter.rank, "conv_alpha": alpha} if adapts_kernels else {}
    network_args |= {"rs_lora": True} if adapter.use_rslora else {}
    network_args |= {"dora_wd": True} if adapter.use_dora else {}
    fields: dict[str, Any] = {
        "ss_output_name": recipe.name,
        "ss_base_model_version": base.kohya_version,
        "ss_v2": "v2" in base.kohya_version.split("_"),
        "ss_network_module": "lycoris.kohya" if adapter.use_dora else "networks.lora",
        "ss_network_dim": adapter.rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(network_args),
        "ss_network_dropout": adapter.dropout or None,
        "ss_seed": recipe.seed,
        "ss_steps": recipe.step,
        "ss_epoch": recipe.step // loop.updates_per_epoch,
        "ss_max_train_steps": loop.num_updates,
        "ss_num_batches_per_epoch": loop.updates_per_epoch * loop.accumulation,
        "ss_num_train_images": loop.num_samples,
        "ss_num_reg_images": 0,
        "ss_learning_rate": recipe.optimizer.lr,
        "ss_unet_lr": recipe.optimizer.lr,
        "ss_lr_scheduler": recipe.lr_scheduler.type,
        "ss_lr_warmup_steps": loop.warmup_updates,
        "ss_optimizer": recipe.optimizer.type,
        "ss_max_grad_norm": loop.max_grad_norm,
        "ss_gradient_accumulation_steps": loop.accumulation,
        "ss_gradient_checkpointing": loop.gradient_checkpointing,
        "ss_batch_size_per_device": loop.batch_size,
        "ss_total_batch_size": loop.global_batch,
        "ss_min_snr_gamma": recipe.objective.min_snr_gamma,
        "ss_resolution": f"({data.resolution}, {data.resolution})",
        "ss_flip_aug": data.flip,
        "ss_random_crop": data.random_crop,
        "ss_caption_dropout_rate": data.caption_dropout,
        "sshs_model_hash": payload_sha256,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": base.architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": recipe.name,
        "modelspec.resolution": f"{data.resolution}x{data.resolution}",
        "modelspec.prediction_type": _PREDICTION_TYPES.get(base.prediction_type, base.prediction_type),
        OWN_KEY: recipe.to_metadata(),
    }
    return {key: str(value) for key, value in fields.items() if value is not None}


def diffusers_metadata(recipe: Recipe, layers: Sequence[str]) -> dict[str, str]:
    """The header of a file in diffusers' layout, with peft's configuration of these layers of each component."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        component, _, name = layer.partition(".")
        names.setdefault(component, []).append(name)
    fields = {
        f"{component}.{key}": sorted(value) if isinstance(value, set) else value
        for component, targets in names.items()
        for key, value in peft_config(recipe.adapter, targets).to_dict().items()
    }
    return {"format": "pt", ADAPTER_KEY: json.dumps(fields, sort_keys=True), OWN_KEY: recipe.to_metadata()}
