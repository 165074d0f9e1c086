"""LoRA files in both layouts: written, read back and compared; those of others read.

An adapter's tensors are named `<component>.<layer>.lora_A.weight`, `... .lora_B.weight` and, with DoRA,
`... .lora_magnitude_vector`; diffusers' layout has these very names. kohya's, which A1111 and ComfyUI read, carries the
scale as a tensor: alpha / rank is what a reader multiplies with, so rank stabilisation writes alpha x sqrt(rank) there.
The headers are a recipe in the words of those who read them: kohya's ss_* fields, ModelSpec, peft's configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from lora_trainer.config.optimizers import AnyOptimizerOptions
from lora_trainer.config.schema import LoraConfig, ObjectiveConfig
from lora_trainer.errors import ModelError, NumericStop, Problem, SystemSetupError
from lora_trainer.models.adapters.bank import peft_config, plain_number
from lora_trainer.models.adapters.targets import select_targets
from lora_trainer.models.family import Family, joined_layers
from lora_trainer.schedules.registry import LRSchedulerOptions
from lora_trainer.storage import safetensors_io
from lora_trainer.storage.safetensors_io import Tensors
from lora_trainer.strict_model import StrictModel

OWN_KEY = "lora_trainer"
MAX_FILE_BYTES = 8 * 2**30
Layout = Literal["kohya", "diffusers"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER_KEY = "lora_adapter_metadata"  # where diffusers looks for alpha and rank stabilisation
LOSS_SAID, LOST_CHANGE = 0.01, 0.1
"""Share of weights lost to the export's dtype from which on it is said; one that changes by more of itself is lost."""
_PREDICTION_TYPES = {"v_prediction": "v", "flow": "flow_matching"}  # in ModelSpec's words


class BaseFacts(StrictModel):
    """What a LoRA file says of the base it belongs to."""

    kohya_version: str
    architecture: str
    prediction_type: str


class LoopFacts(StrictModel):
    """Counts of the run. An alias is the key in the file, which keeps its first name."""

    model_config = ConfigDict(populate_by_name=True)

    num_images: int
    num_samples: int
    num_steps: Annotated[int, Field(alias="num_updates")]
    steps_per_epoch: Annotated[int, Field(alias="updates_per_epoch")]
    num_warmup_steps: Annotated[int, Field(alias="warmup_updates")]
    batch_size: int
    accumulation: int
    global_batch: int
    max_grad_norm: float | None
    ema_decay: float | None
    gradient_checkpointing: bool


class DataFacts(StrictModel):
    """How images were framed."""

    resolution: int
    random_crop: bool
    flip: bool
    caption_dropout: float


class Recipe(StrictModel):
    """How a LoRA was made, as it travels inside its file: enough to write either layout's metadata again.

    Nothing that names a person, a machine, a path, a prompt or a moment: two equal runs give byte-equal files.
    """

    version: str
    name: str
    step: int
    seed: int
    base: BaseFacts
    adapter: LoraConfig
    objective: ObjectiveConfig
    optimizer: AnyOptimizerOptions
    lr_scheduler: LRSchedulerOptions
    loop: LoopFacts
    data: DataFacts

    def to_metadata(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True)


def read_recipe(metadata: Mapping[str, Any]) -> Recipe | None:
    """The recipe in a LoRA file's metadata; None if the file is not ours or its recipe is not understood."""
    try:
        return Recipe.model_validate_json(metadata.get(OWN_KEY, ""))
    except ValidationError:
        return None


def write_lora(
    file: Path, adapter: Mapping[str, torch.Tensor], recipe: Recipe, family: Family, *, layout: Layout, dtype: str
) -> str | None:
    """Write a LoRA file in one of the two layouts, read it back and compare; what the dtype loses, if much.

    Args:
        adapter: tensors by `<component>.<layer>.lora_A.weight`.

    Raises:
        NumericStop: a value is not finite; nothing is written.
        SystemSetupError: what was read back is not what was written.
    """
    layers = sorted({key.rpartition(".lora_")[0] for key in adapter})
    if layout == "kohya":
        named = to_kohya(adapter, joined_layers(family.kohya_names(layers)), recipe.adapter)
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
        raise SystemSetupError(
            Problem("the LoRA file could not be read back as written", str(file), fix="check the disk")
        )
    return lost_to_dtype(adapter, dtype)


def lost_to_dtype(adapter: Mapping[str, torch.Tensor], dtype: str) -> str | None:
    """Which share of the weights a dtype cannot hold, and one that can; None where it is small.

    Lost are those other than 0 that become 0 or change by more than a tenth.
    """
    counts: dict[str, torch.Tensor] = {}
    for name, tensor in adapter.items():
        kind = name.partition(".lora_")[2].removesuffix(".weight")
        lost = (tensor - tensor.to(DTYPES[dtype]).to(tensor.dtype)).abs() > LOST_CHANGE * tensor.abs()
        counts[kind] = counts.get(kind, 0) + torch.stack([lost.sum(), tensor.count_nonzero()])
    share, kind = max((int(lost) / max(1, int(num)), kind) for kind, (lost, num) in counts.items())
    if share < LOSS_SAID:
        return None
    return f"{share:.1%} of the weights in lora_{kind} are too small for {dtype} and are lost: {_wider(dtype)}"


def _wider(dtype: str) -> str:
    """How to write a dtype of more range."""
    dtype = "bf16" if dtype == "fp16" else "fp32"
    return f"write export.dtype={dtype}, or use `lora-trainer export --dtype {dtype}` on the run"


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
        if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
            why = f"it is no regular file, or larger than {MAX_FILE_BYTES:,} bytes"
            raise ModelError(Problem("the LoRA file cannot be read", str(file), why))
        tensors, metadata = safetensors_io.load(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(Problem("the LoRA file cannot be read", str(file), str(error))) from error
    if not any("lora_" in key for key in tensors):
        why = f"its tensors are like {next(iter(tensors), 'none')}"
        raise ModelError(Problem("the file holds no LoRA", str(file), why))
    faulty = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if faulty:
        what = f"{len(faulty)} of its tensors hold NaN or infinite values, as `{faulty[0]}`"
        raise ModelError(Problem(what, str(file), fix="use an earlier LoRA of that run"))
    return tensors, metadata


def check_fit(tensors: Tensors, file: Path, family: Family, recipe: Recipe | None = None) -> None:
    """Whether each adapter of the base's denoiser is whole and has its layer's shape; text encoders' are not looked at.

    Args:
        recipe: the layers must be its targets, with its rank, alpha and kind, and no others.

    Raises:
        ModelError: it names the first that does not, and how many there are.
    """
    base, kohya = family.base, is_kohya(tensors)
    shapes = {f"{base.denoiser}.{layer}": shape for layer, shape in base.denoiser_shapes().items()}
    names = joined_layers(family.kohya_names(shapes)) if kohya else {layer: [layer] for layer in shapes}
    halves = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    own = {key.partition(".")[0] if kohya else key.rpartition(".lora_")[0] for key in tensors}
    faults = []
    for name in sorted(name for name in own if recipe or not name.startswith("lora_te" if kohya else "text_")):
        down, up = (tensors.get(f"{name}.{half}.weight") for half in halves)
        alpha, layers = tensors.get(f"{name}.alpha"), names.get(name)
        magnitude = tensors.get(f"{name}.{'dora_scale' if kohya else 'lora_magnitude_vector'}")
        if layers is None or down is None or up is None:
            faults.append(f"`{name}` is no layer of the base" if layers is None else f"`{name}` lacks a half")
            continue
        outputs, inputs = sum(shapes[layer][0] for layer in layers), shapes[layers[0]][1:]
        rank = down.shape[0] if down.dim() else 0
        wanted = (rank, *inputs), (outputs, rank)
        if not rank or any(
            _bare(list(half.shape)) != _bare(list(shape)) for half, shape in zip((down, up), wanted, strict=True)
        ):
            faults.append(f"`{name}` has the shapes {tuple(down.shape)} and {tuple(up.shape)}, not {wanted}")
        elif alpha is not None and alpha.numel() != 1:
            faults.append(f"`{name}.alpha` is not one number")
        elif magnitude is not None and magnitude.numel() != outputs:
            faults.append(f"`{name}` has {magnitude.numel()} magnitudes for {outputs} outputs")
        elif recipe is not None:
            options, scale = recipe.adapter, _kohya_alpha(recipe.adapter, len(layers)) if kohya else None
            if (rank, alpha, magnitude is not None) != (options.rank * len(layers), scale, options.use_dora):
                faults.append(f"`{name}` has another rank, alpha or kind than its recipe says")
    if recipe is not None:
        targets = select_targets(base.denoiser_shapes(), recipe.adapter.targets, family.target_presets)
        adapted = {layer for name in own & names.keys() for layer in names[name]}
        odd = sorted(adapted ^ {f"{base.denoiser}.{layer}" for layer in targets})
        faults += [f"`{name}` is {'not ' * (name in adapted)}in its recipe's targets" for name in odd]
    if faults:
        what = (
            f"the LoRA does not fit the base {base.path}{' or its recipe' * bool(recipe)}: {len(faults)} of its layers"
        )
        raise ModelError(Problem(what, str(file), faults[0], "use it as it was written, with --model for its own base"))


def _bare(shape: list[int]) -> list[int]:
    """A kernel of 1 x 1 is a matrix."""
    return shape[:2] if shape[2:] == [1, 1] else shape


def is_kohya(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(key.endswith(".lora_down.weight") for key in tensors)


def _converted(tensors: Mapping[str, torch.Tensor], dtype: str, file: Path) -> Tensors:
    """The tensors in the export's dtype, on the CPU; alphas stay fp32, which holds them exactly."""
    converted = {}
    for name, tensor in tensors.items():
        kept = tensor.float() if name.endswith(".alpha") else tensor.to(DTYPES[dtype])
        if not torch.isfinite(kept).all():
            was_finite = torch.isfinite(tensor).all()
            why = f"it is outside of {dtype}'s range" if was_finite else "training diverged"
            fix = _wider(dtype) if was_finite else None
            raise NumericStop(Problem(f"`{name}` is not finite and is never saved", str(file.name), why, fix))
        converted[name] = kept.cpu().contiguous()
    return converted


def to_kohya(adapter: Mapping[str, torch.Tensor], names: Mapping[str, Sequence[str]], options: LoraConfig) -> Tensors:
    """kohya's layout: `<name>.lora_down.weight / lora_up.weight / alpha / dora_scale`.

    Layers joined under one name become one of their common rank: their A stand above each other, their B along a
    diagonal, and alpha grows with the rank, so that their updates stay what they were.

    Args:
        names: the layers that stand under each name (`models.family.joined_layers`).
    """
    tensors: Tensors = {}
    for name, layers in names.items():
        downs, ups = ([adapter[f"{layer}.lora_{kind}.weight"] for layer in layers] for kind in "AB")
        tensors[f"{name}.lora_down.weight"] = torch.cat(downs)
        tensors[f"{name}.lora_up.weight"] = ups[0] if len(ups) == 1 else torch.block_diag(*ups)
        tensors[f"{name}.alpha"] = _kohya_alpha(options, len(layers))
        if f"{layers[0]}.lora_magnitude_vector" in adapter:  # one number per output, shaped to multiply the weight
            magnitudes = torch.cat([adapter[f"{layer}.lora_magnitude_vector"].flatten() for layer in layers])
            tensors[f"{name}.dora_scale"] = magnitudes.reshape((-1, 1, 1, 1) if downs[0].dim() == 4 else (-1, 1))
    return tensors


def _kohya_alpha(options: LoraConfig, num_layers: int) -> torch.Tensor:
    alpha = options.alpha * math.sqrt(options.rank) if options.use_rslora else options.alpha
    return torch.tensor(alpha * num_layers, dtype=torch.float32)


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
        "ss_epoch": recipe.step // loop.steps_per_epoch,
        "ss_max_train_steps": loop.num_steps,
        "ss_num_batches_per_epoch": loop.steps_per_epoch * loop.accumulation,
        "ss_num_train_images": loop.num_samples,
        "ss_num_reg_images": 0,
        "ss_learning_rate": recipe.optimizer.lr,
        "ss_unet_lr": recipe.optimizer.lr,
        "ss_lr_scheduler": recipe.lr_scheduler.type,
        "ss_lr_warmup_steps": loop.num_warmup_steps,
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
