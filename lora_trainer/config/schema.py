"""The whole configuration, section by section. What is written here is what `docs/config.md` says.

`LEVELS` at its foot says of each field whether it may change between a run and its resume.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from lora_trainer.config.optimizers import AdamW, AnyOptimizerOptions
from lora_trainer.config.sweep_schema import Seed, SweepConfig
from lora_trainer.schedules.curves import Constant
from lora_trainer.schedules.registry import LRSchedulerOptions
from lora_trainer.schedules.schedule import Duration, check_period
from lora_trainer.strict_model import Count, NotBool, Positive, Ratio, StrictModel, matching


def _check_path(value: str) -> str:
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no path: {str(error).lower()}") from error
    if len(os.fsencode(path)) > 3900 or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ValueError("no path is that long: 255 bytes for each name and 3,900 in all")
    return value


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _adamw_unless_said(value: Any) -> Any:
    return {"type": "adamw", **value} if isinstance(value, dict) else value


_NAME_RULE = "a run's name becomes a folder's name: letters, digits, `_`, `-`, `.`, `+`, at most 100"
Period = Annotated[Duration | None, AfterValidator(check_period)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]


class ModelConfig(StrictModel):
    """The base checkpoint, which stays frozen."""

    path: PathText
    """A diffusers folder (with model_index.json), or a Hub id such as `org/name` together with `revision`."""
    family: str = "auto"
    """Model family; `auto` reads it from the folder. `sd` is Stable Diffusion 1.x and 2.x."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id; required there, so that a run means one set of weights."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the denoiser predicts; `auto` takes it from the base's noise scheduler."""


class SourceConfig(StrictModel):
    """One folder of images."""

    dir: PathText
    """Folder of images with captions beside them; subfolders count too."""
    repeats: Count = 1
    """How often each image is seen per epoch, on top of the N of a folder `N_name` (N up to 100; more is a name)."""


class CaptionConfig(StrictModel):
    """Text beside each image."""

    extension: Annotated[str, matching(r"\.[A-Za-z0-9]+", "expected an ending with its dot, as .txt")] = ".txt"
    """Ending of the caption files, in the image's place and under its name."""
    missing: Literal["error", "filename", "empty"] = "error"
    """An image without a caption: refuse, use its file name's words (or its folder's), or the empty prompt."""
    lines: Literal["first", "all"] = "first"
    """`first` line only, or `all` lines as variants of which one is drawn each time."""
    too_long: Literal["error", "cut"] = "error"
    """A caption of more tokens than the text encoder reads: refuse, or cut and count."""
    dropout: Ratio = 0.0
    """Probability of training a sample on the empty prompt (0.05-0.1 keeps classifier-free guidance strong)."""


class DataConfig(StrictModel):
    """The images and how they are framed. They are only ever read."""

    dir: PathText | None = None
    """Folder of images; exactly one of `dir` and `sources`."""
    sources: Annotated[tuple[SourceConfig, ...] | None, Field(min_length=1)] = None
    """Several folders with repeats."""
    resolution: Annotated[int, Field(ge=32, le=4096), NotBool] = 512
    """Side of the square that each image is scaled and cropped to, px."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut out; `random` draws one of `crops_per_image` places each time."""
    crops_per_image: Annotated[int, Field(ge=1, le=64), NotBool] | None = None
    """Number of cached places with `crop: random` (default 4)."""
    flip: bool = False
    """Mirror left-right half of the time; not for text, logos or asymmetric subjects."""
    captions: CaptionConfig = CaptionConfig()
    cache_dir: PathText | None = None
    """Where latents and prompt embeddings are kept; default `<output_dir>/.cache`."""


class LoraConfig(StrictModel):
    """Low-rank adapters on the denoiser, injected by peft."""

    type: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=1024), NotBool] = 16
    """Rank of each adapter."""
    alpha: Positive = 16
    """The adapter's output is scaled by alpha / rank (alpha / sqrt(rank) with `use_rslora`)."""
    targets: str | Annotated[tuple[str, ...], Field(min_length=1)] = "attention"
    """A named list of layers (docs/targets.md), or a list of patterns for the end of a layer's name (`attn2.to_k`)."""
    dropout: Annotated[float, Field(ge=0, lt=1), NotBool] = 0.0
    """Dropout on each adapter's input."""
    use_rslora: bool = False
    """Rank-stabilised scale alpha / sqrt(rank) (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Weight-decomposed adapters with a learned magnitude per output (Liu et al. 2024)."""


class ObjectiveConfig(StrictModel):
    """What is minimised: the squared error of the predicted noise (or v), averaged over each image."""

    min_snr_gamma: Positive | None = None
    """Weight timesteps by min(SNR, gamma) / SNR (Hang et al. 2023); 5 is the paper's value, null is off."""


class TrainConfig(StrictModel):
    """The loop."""

    max_steps: Count | None = None
    """Optimizer updates in all; exactly one of `max_steps` and `epochs`."""
    epochs: Count | None = None
    """Passes over all samples; exactly one of `max_steps` and `epochs`."""
    batch_size: Count = 1
    """Images per process and forward."""
    gradient_accumulation_steps: Count = 1
    """Forwards per update; global batch = processes x batch_size x this."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null does not clip."""
    ema_decay: Annotated[float, Field(gt=0, lt=1), NotBool] | None = None
    """Keep an exponential moving average of the adapter (0.999, say) and export that; null is off."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of base and forward pass; adapters are always fp32. `auto`: bf16 on a GPU that has it, else fp16; CPU fp32."""
    threads: Literal["auto"] | Count = "auto"
    """CPU threads per process; `auto` is physical cores / local processes, stored with the run."""


class ValidationConfig(StrictModel):
    """A probe: fixed images, timesteps and noise on which the loss is measured again and again. Off unless present."""

    dir: PathText | None = None
    """Folder of held-out images with captions; exactly one of `dir` and `fraction`."""
    fraction: Annotated[float, Field(gt=0, le=0.5), NotBool] | None = None
    """Share of the training images to hold out (at least 2), chosen by content, so that adding files moves none."""
    prior_dir: PathText | None = None
    """Folder of images with captions that the LoRA should leave alone: shows forgetting."""
    seed: Seed = 0
    """Of the choice and of the probe's noise; its own, so that runs with other training seeds can be compared."""
    every_steps: Annotated[Duration, AfterValidator(check_period)] = "10%"
    """Period between probes; one more is made after the last update."""
    batch_size: Count = 8
    """Images per forward of the probe; changes nothing but speed and memory."""
    max_cost: Annotated[float, Field(gt=0, le=1), NotBool] = 0.1
    """Cap on the probes' forwards as a share of the training's; held first by fewer items, then by a longer period."""
    keep_best: bool = True
    """Keep `<name>-best.safetensors`, the LoRA of the probe with the smallest held-out loss."""


class PromptConfig(StrictModel):
    """One sample image."""

    prompt: str
    """What to draw."""
    negative_prompt: str = ""
    """What to steer away from."""
    seed: Seed = 0
    """Of the image's initial noise; the same at every step, so that samples can be compared."""


def _prompt(value: Any) -> Any:
    return {"prompt": value} if isinstance(value, str) else value


class SampleConfig(StrictModel):
    """Images drawn before, during and after training. They never touch the training's randomness."""

    prompts: Annotated[
        tuple[Annotated[PromptConfig, BeforeValidator(_prompt)], ...], BeforeValidator(_one_or_more)
    ] = ()
    """Texts, or mappings of prompt, negative_prompt and seed."""
    every_steps: Period = None
    """Period between the first sample (before training) and the last (after it)."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000), NotBool] = 25
    """Denoising steps per image."""
    guidance_scale: Annotated[float, Field(ge=1), NotBool] = 7.5
    """Classifier-free guidance; 1 is none."""


class CheckpointConfig(StrictModel):
    """What a resume needs. The last update always saves."""

    every_steps: Period = 250
    """Period of checkpoints; null saves at the end and on a signal only."""
    keep_last: Annotated[int, Field(ge=2), NotBool] = 2
    """Number of checkpoints kept."""
    on_disk_full: Literal["continue", "stop"] = "continue"
    """When the disk takes no checkpoint: train on and try again at the next one, or stop (exit 5) with a LoRA file."""


class ResumeConfig(StrictModel):
    """What may differ when a stopped run is continued. Without these keys a changed setting stops the resume."""

    allow_changes: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = ()
    """Settings (`optimizer.lr`, a section as `lr_scheduler`) or contents (`data content`) that may have changed."""
    schedule: Literal["keep", "stretch"] = "keep"
    """LR of a longer run: `keep` the curve of the first length, then its last value, or `stretch` it over the new."""


class ExportConfig(StrictModel):
    """The LoRA files. The last update always exports."""

    every_steps: Period = None
    """Period of numbered exports `<name>-step00000500.safetensors`, which are never removed."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Of the tensors in the files. From 1 % of lost weights on it is said: in fp16 those below about 1e-7."""


class TrackingConfig(StrictModel):
    """Where the numbers of each step go beside metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard events under `tensorboard/` in the run directory."""
    base_loss_every: Count | None = 10
    """Every so many updates run the frozen base on the same noised batch and log the ratio; null is off."""


class RunConfig(StrictModel):
    """One training run."""

    name: Annotated[str, matching(r"[\w][\w.+-]{0,99}", _NAME_RULE)]
    """Name of the run directory and of the LoRA file."""
    output_dir: PathText = "runs"
    """The run directory is `<output_dir>/<name>`."""
    seed: Seed = 42
    """Of everything random: adapter init, order, crops, flips, captions, timesteps, noise."""
    model: ModelConfig
    data: DataConfig
    adapter: LoraConfig = LoraConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: Annotated[AnyOptimizerOptions, BeforeValidator(_adamw_unless_said)] = AdamW()
    lr_scheduler: LRSchedulerOptions = Constant()
    train: TrainConfig
    validation: ValidationConfig | None = None
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
    export: ExportConfig = ExportConfig()
    tracking: TrackingConfig = TrackingConfig()
    sweep: SweepConfig | None = None


Level = Literal["refuse", "say", "free"]
CURVE_LENGTH = "lr curve length"
"""Fact: the number of updates that the LR curves are laid over."""
FACTS: dict[str, Level] = {
    "base content": "refuse",
    "data content": "refuse",
    "data order": "refuse",
    "validation content": "refuse",
    "global batch": "refuse",
    CURVE_LENGTH: "refuse",
    "num_processes": "say",
    "device": "say",
    "torch": "say",
    "diffusers": "say",
    "peft": "say",
    "accelerate": "say",
}
"""What a run's identity holds beside its settings. Files count by content: their names and places are free."""

_SETTINGS: dict[Level, str] = {
    "refuse": """
        seed model.prediction_type objective.min_snr_gamma optimizer.* lr_scheduler.*
        data.resolution data.crop data.crops_per_image data.flip data.captions.dropout
        adapter.type adapter.rank adapter.alpha adapter.targets adapter.dropout adapter.use_rslora adapter.use_dora
        train.max_steps train.epochs train.max_grad_norm train.ema_decay train.precision
        validation.fraction validation.seed validation.every_steps validation.max_cost
    """,
    "say": """
        train.batch_size train.gradient_accumulation_steps train.gradient_checkpointing train.threads
        validation.batch_size
    """,
    "free": """
        name output_dir model.path model.family model.revision
        data.dir data.sources data.cache_dir
        data.captions.extension data.captions.missing data.captions.lines data.captions.too_long
        validation.dir validation.prior_dir validation.keep_best
        sample.* checkpoint.* resume.* export.* tracking.* sweep.*
    """,
}
LEVELS: dict[str, Level] = {key: level for level, keys in _SETTINGS.items() for key in keys.split()} | FACTS
"""How a resume takes another value of a setting or fact; `section.*` stands for all keys of a section.

`refuse`: it decides what is learned, so another value is refused unless `resume.allow_changes` names it. `say`: it may
move the last bits or the speed, which is told. `free`: neither.
"""
