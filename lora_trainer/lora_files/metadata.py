"""A recipe in the words of those who read LoRA files: kohya's ss_* fields, ModelSpec, peft's configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lora_trainer.lora_files.recipe import OWN_KEY, Recipe
from lora_trainer.models.adapters.bank import peft_config

ADAPTER_KEY = "lora_adapter_metadata"  # where diffusers looks for alpha and rank stabilisation
_PREDICTION_TYPES = {"v_prediction": "v", "flow": "flow_matching"}  # in ModelSpec's words


def kohya_metadata(recipe: Recipe, payload_sha256: str, *, adapts_kernels: bool) -> dict[str, str]:
    """The header of a file in kohya's layout; all values are strings, as the format wants.

    Args:
        adapts_kernels: whether convolutions larger than 1 x 1 have adapters.
    """
    adapter, base, loop, data = recipe.adapter, recipe.base, recipe.loop, recipe.data
    fields: dict[str, Any] = {
        "ss_output_name": recipe.name,
        "ss_base_model_version": base.kohya_version,
        "ss_v2": "v2" in base.kohya_version.split("_"),
        "ss_network_module": "lycoris.kohya" if adapter.use_dora else "networks.lora",
        "ss_network_dim": adapter.rank,
        "ss_network_alpha": _plain(adapter.alpha),
        "ss_network_args": json.dumps(_network_args(recipe, adapts_kernels)),
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
    own: dict[str, list[str]] = {}
    for layer in layers:
        component, _, name = layer.partition(".")
        own.setdefault(component, []).append(name)
    fields = {
        f"{component}.{key}": sorted(value) if isinstance(value, set) else value
        for component, names in own.items()
        for key, value in peft_config(recipe.adapter, names).to_dict().items()
    }
    return {"format": "pt", ADAPTER_KEY: json.dumps(fields, sort_keys=True), OWN_KEY: recipe.to_metadata()}


def _network_args(recipe: Recipe, adapts_kernels: bool) -> dict[str, Any]:
    adapter = recipe.adapter
    args: dict[str, Any] = {}
    if adapts_kernels:
        args |= {"conv_dim": adapter.rank, "conv_alpha": _plain(adapter.alpha)}
    if adapter.use_rslora:
        args["rs_lora"] = True
    if adapter.use_dora:
        args["dora_wd"] = True
    return args


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number
