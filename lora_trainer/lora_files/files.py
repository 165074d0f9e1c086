"""Write the LoRA files, read them back and compare; read those of others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from lora_trainer.errors import HostError, ModelError, NumericStop, Problem
from lora_trainer.lora_files.layouts import diffusers_metadata, kohya_metadata, to_kohya
from lora_trainer.lora_files.recipe import BaseFacts, Recipe
from lora_trainer.models.family import Family, joined_layers
from lora_trainer.storage import safetensors_io
from lora_trainer.storage.safetensors_io import Tensors

Layout = Literal["kohya", "diffusers"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_lora(
    file: Path, adapter: Mapping[str, torch.Tensor], recipe: Recipe, family: Family, *, layout: Layout, dtype: str
) -> None:
    """Write a LoRA file in one of the two layouts, read it back and compare.

    Args:
        adapter: tensors by `<component>.<layer>.lora_A.weight`.

    Raises:
        NumericStop: a value is not finite; nothing is written.
        HostError: what was read back is not what was written.
    """
    layers = sorted({key.rpartition(".lora_")[0] for key in adapter})
    if layout == "kohya":
        options = recipe.adapter
        names = joined_layers(family.kohya_names(layers))
        named = to_kohya(adapter, names, alpha=options.alpha, use_rslora=options.use_rslora)
        tensors = _converted(named, dtype, file)
        adapts_kernels = any(tensor.dim() == 4 and max(tensor.shape[2:]) > 1 for tensor in adapter.values())
        metadata = kohya_metadata(recipe, safetensors_io.payload_sha256(tensors), adapts_kernels=adapts_kernels)
    else:
        tensors = _converted(adapter, dtype, file)
        metadata = diffusers_metadata(recipe, layers)
    safetensors_io.save(file, tensors, metadata)
    read_back, read_metadata = safetensors_io.load(file)
    same = read_back.keys() == tensors.keys() and all(torch.equal(read_back[key], tensors[key]) for key in tensors)
    if not same or read_metadata != metadata:
        raise HostError(Problem("the LoRA file could not be read back as written", str(file), fix="check the disk"))


def base_facts(family: Family, prediction_type: str) -> BaseFacts:
    """What a LoRA file says of its base."""
    version, architecture = family.kohya_version, family.architecture
    return BaseFacts(kohya_version=version, architecture=architecture, prediction_type=prediction_type)


def read_lora(file: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a LoRA file in either layout.

    Raises:
        ModelError: it is missing, damaged, or no LoRA.
    """
    if file.suffix != ".safetensors":
        raise ModelError(Problem("a LoRA file ends in .safetensors; pickled files are never opened", str(file)))
    try:
        tensors, metadata = safetensors_io.load(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(Problem("the LoRA file cannot be read", str(file), str(error))) from error
    if not any("lora_" in key for key in tensors):
        why = f"its tensors are like {next(iter(tensors), 'none')}"
        raise ModelError(Problem("the file holds no LoRA", str(file), why))
    return tensors, metadata


def is_kohya(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(key.endswith(".lora_down.weight") for key in tensors)


def _converted(tensors: Mapping[str, torch.Tensor], dtype: str, file: Path) -> Tensors:
    """The tensors in the export's dtype, on the CPU; alphas stay fp32, which holds them exactly."""
    converted = {}
    for name, tensor in tensors.items():
        kept = tensor.float() if name.endswith(".alpha") else tensor.to(DTYPES[dtype])
        if not torch.isfinite(kept).all():
            was_finite = torch.isfinite(tensor).all()
            why = "it left fp16's range: write export.dtype=bf16" if was_finite else "training diverged"
            raise NumericStop(Problem(f"`{name}` is not finite and is never saved", str(file.name), why))
        converted[name] = kept.cpu().contiguous()
    return converted
