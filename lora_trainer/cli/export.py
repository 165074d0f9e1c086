"""`lora-trainer export`: LoRA files again from a run's checkpoint, or one layout from the other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lora_trainer.cli.sample import find_base
from lora_trainer.cli.session import check_output
from lora_trainer.config.load import load_config
from lora_trainer.config.places import CHECKPOINTS, CONFIG_FILE, PLAN_FILE
from lora_trainer.errors import ConfigError, ModelError, Problem, SystemSetupError
from lora_trainer.lora_files.files import (
    OWN_KEY,
    Layout,
    base_facts,
    check_fit,
    from_kohya,
    is_kohya,
    read_lora,
    read_recipe,
    write_lora,
)
from lora_trainer.models.family import joined_layers
from lora_trainer.models.registry import open_base, open_family
from lora_trainer.planning.run_plan import RunPlan
from lora_trainer.storage.atomic_files import read_json
from lora_trainer.storage.checkpoint import open_checkpoint
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.resume import stored_trial
from lora_trainer.training.run_files import recipe_of

Weights = Literal["exported", "raw"]


def export_run(run_dir: Path, step: int | None, layout: Layout, dtype: str, weights: Weights, output: Path) -> None:
    """Write a LoRA file from a checkpoint of a run: the newest one, or that of `step`.

    Args:
        weights: `exported` takes the moving average where the run keeps one, `raw` the adapter itself.

    Raises:
        ConfigError: the folder holds no run.
        SystemSetupError: it holds no whole checkpoint of that step.
    """
    check_output(output, _is_ours)
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(Problem("no run here: config.yaml is missing", str(run_dir), fix="name a run directory"))
    config = load_config(run_dir / CONFIG_FILE)
    if config.sweep is not None:
        what, fix = (
            "this is a sweep; its LoRAs lie under trials/",
            "name a file there: trials/<trial>/<trial>.safetensors",
        )
        raise ConfigError(Problem(what, str(run_dir), fix=fix))
    if not any((run_dir / CHECKPOINTS).glob("step-*")) and (files := sorted(run_dir.glob("*.safetensors"))):
        what, why = "the folder holds no checkpoints", "those of a sweep's trials are kept by group"
        raise ConfigError(Problem(what, str(run_dir), why, f"name a LoRA file there, as {files[0]}"))
    try:
        plan = RunPlan.from_json(read_json(run_dir / PLAN_FILE))
    except (OSError, ValueError, RecursionError) as error:
        what, fix = "the run's plan cannot be read", "export from its LoRA file"
        raise SystemSetupError(Problem(what, str(run_dir / PLAN_FILE), str(error), fix)) from error
    checkpoint = open_checkpoint(run_dir / CHECKPOINTS, step)
    base = open_base(**config.model.model_dump())
    family = open_family(base)
    step, parts = stored_trial(checkpoint)
    adapter = parts.get("average", parts["adapter"]) if weights == "exported" else parts["adapter"]
    facts = base_facts(family, base.prediction_type())
    recipe = recipe_of(config, plan, facts, step)
    check_fit(adapter, checkpoint.folder, family, recipe)
    _say(write_lora(output, adapter, recipe, family, layout=layout, dtype=dtype))


def convert_file(lora: Path, layout: Layout, dtype: str, model: str | None, output: Path) -> None:
    """Write a LoRA file of ours in the other layout or dtype.

    Raises:
        ModelError: the file was not written by lora_trainer, so its scale is not known for sure.
    """
    check_output(output, _is_ours)
    tensors, metadata = read_lora(lora)
    recipe = read_recipe(metadata)
    if recipe is None:
        if OWN_KEY in metadata:
            what = (
                "how this LoRA was made is not understood: a newer version or a plug-in that is not installed wrote it"
            )
            fix = f"install it; the file says: {str(metadata[OWN_KEY])[:300]}"
        else:
            what, fix = "the file was not written by lora_trainer", "convert it with the tool that wrote it"
        raise ModelError(Problem(what, str(lora), fix=fix))
    base = find_base(lora, model, None)
    family = open_family(base)
    check_fit(tensors, lora, family, recipe)
    if is_kohya(tensors):
        num_outputs = {f"{base.denoiser}.{layer}": shape[0] for layer, shape in base.denoiser_shapes().items()}
        tensors = from_kohya(tensors, joined_layers(family.kohya_names(num_outputs)), num_outputs)
    _say(write_lora(output, tensors, recipe, family, layout=layout, dtype=dtype))


def _say(lost: str | None) -> None:
    if lost:
        MainConsole().print(lost)


def _is_ours(file: Path) -> bool:
    try:
        return read_recipe(read_lora(file)[1]) is not None
    except ModelError:
        return False
