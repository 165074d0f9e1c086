"""`lora-trainer sample`: draw images with a LoRA file, through stock diffusers, as any other program would load it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from lora_trainer.config.load import load_config
from lora_trainer.config.places import CONFIG_FILE
from lora_trainer.errors import ConfigError, ModelError, Problem, remedy_of_absence
from lora_trainer.models.family import Family
from lora_trainer.models.folder import BaseFolder
from lora_trainer.models.registry import open_base, open_family
from lora_trainer.planning.preflight import check_prompts, long_prompts
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.console import LOADING, MainConsole


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What to draw."""

    prompts: tuple[str, ...]
    negative_prompt: str
    seed: int
    num_images: int
    num_inference_steps: int
    guidance_scale: float
    lora_scale: float
    size_px: int | None

    def texts(self) -> list[tuple[str, str]]:
        """What is read of it, with its place."""
        return [*(("--prompt", text) for text in self.prompts), ("--negative-prompt", self.negative_prompt)]


def _check_request(request: SampleRequest, base: BaseFolder, family: Family) -> None:
    """That the base can draw what is asked for.

    Raises:
        ConfigError: a prompt is too long, or the size or the number of steps is not possible.
    """
    if too_long := long_prompts(request.texts(), family):
        raise ConfigError(*(replace(problem, fix="shorten it") for problem in too_long))
    if request.size_px is not None and request.size_px % family.latent_factor:
        what = f"--size {request.size_px} is no multiple of {family.latent_factor}"
        raise ConfigError(Problem(what, fix=f"write {request.size_px // family.latent_factor * family.latent_factor}"))
    if request.num_inference_steps > base.most_inference_steps:
        what = f"the base's scheduler has no more than {base.most_inference_steps} steps"
        raise ConfigError(Problem(what, fix=f"write --steps {base.most_inference_steps} or fewer"))


def sample(lora: Path, model: str | None, revision: str | None, request: SampleRequest, output: Path) -> list[Path]:
    """Draw `num_images` per prompt with consecutive seeds and write them under `output`; the files.

    Raises:
        ModelError: the LoRA or the base cannot be used.
    """
    check_there(lora)
    check_prompts(request.texts())
    base = find_base(lora, model, revision)
    console = MainConsole()
    console.aside(LOADING)

    import torch

    from lora_trainer.lora_files.files import check_fit, read_lora, read_recipe
    from lora_trainer.runtime.runtime import default_device
    from lora_trainer.training.denoiser import png_bytes

    tensors, metadata = read_lora(lora)
    if any(key.endswith(".dora_scale") for key in tensors):
        what = "diffusers drops the DoRA magnitudes of a file in kohya's layout"
        fix = "sample from diffusers/pytorch_lora_weights.safetensors beside it"
        raise ModelError(Problem(what, str(lora), fix=fix))
    family = open_family(base)
    check_fit(tensors, lora, family)
    _check_request(request, base, family)
    console.aside(f"loading {base.path} and {lora}")
    pipeline = family.load_pipeline()
    if (recipe := read_recipe(metadata)) is not None:
        kept, chosen = pipeline.scheduler, recipe.base.prediction_type
        pipeline.scheduler = type(kept).from_config(kept.config, prediction_type=chosen)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="lora")
    pipeline.set_adapters(["lora"], adapter_weights=[request.lora_scale])
    pipeline.to(default_device())
    pipeline.set_progress_bar_config(disable=True)
    jobs = [(prompt, request.seed + number) for prompt in request.prompts for number in range(request.num_images)]
    files = []
    for number, (prompt, seed) in enumerate(console.track(jobs, "drawing", len(jobs)), start=1):
        image = pipeline(
            prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            height=request.size_px,
            width=request.size_px,
        ).images[0]
        file = output / f"{number:02d}-seed{seed}-{_slug(prompt)}.png"
        atomic_files.write_file(file, png_bytes(image))
        console.print(str(file))
        files.append(file)
    return files


def check_there(lora: Path) -> None:
    """Refuse a LoRA file that does not exist, with a ConfigError."""
    if not lora.exists():
        fix = remedy_of_absence(str(lora), "the file, as runs/demo/demo.safetensors")
        raise ConfigError(Problem("the LoRA file does not exist", str(lora.absolute()), fix=fix))


def find_base(lora: Path, model: str | None, revision: str | None) -> BaseFolder:
    """The base named, or the one of the run that the LoRA file lies in.

    Raises:
        ConfigError: none is named and the file lies in no run directory.
    """
    if model is not None:
        return open_base(model, revision)
    for folder in (lora.parent, lora.parent.parent):
        if (folder / CONFIG_FILE).is_file():
            return open_base(**load_config(folder / CONFIG_FILE).model.model_dump())
    what, fix = "which base? The LoRA lies in no run directory", "add --model path/to/diffusers-folder"
    raise ConfigError(Problem(what, str(lora), fix=fix))


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt).strip("-")[:40] or "empty"
