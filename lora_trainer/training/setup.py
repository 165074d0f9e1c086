"""What a group computes with: caches, the frozen base, an adapter per trial, and what moves and measures them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lora_trainer.data.batches import BatchSource, PromptStore
from lora_trainer.data.cache import Cache, build_cache
from lora_trainer.diffusion.noise_paths import noise_path
from lora_trainer.models.adapters.bank import AdapterBank, peft_config
from lora_trainer.models.family import Family
from lora_trainer.models.registry import open_family
from lora_trainer.planning.prepare import Prepared
from lora_trainer.runtime.runtime import Runtime, from_main
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.denoiser import AdaptedDenoiser
from lora_trainer.training.group import TrialGroup
from lora_trainer.training.optimizer_step import OptimizerStep
from lora_trainer.training.trial import Trial, passes_of
from lora_trainer.training.validation import ValidationSchedule, Validator

MEMORY_SHARE = 0.7
"""Of the free memory: the rest is for the workspaces of kernels and for other processes."""
STATE_COPIES = 4  # gradient, two moments, average: in fp32
ACTIVATION_MARGIN = 1.5  # gradients of activations come on top of what the forward keeps


@dataclass(frozen=True, slots=True)
class Setup:
    """The frozen base, the trials on it, and what updates and measures them."""

    denoiser: AdaptedDenoiser
    prompts: PromptStore
    trials: tuple[Trial, ...]
    trials_per_pass: int
    """The most that share a forward."""
    optimizer_step: OptimizerStep
    validation: ValidationSchedule | None
    """None where the config has no validation section."""
    num_steps: int


def set_up(
    group: TrialGroup, runtime: Runtime, console: MainConsole, *, trials_per_pass: int | Literal["auto"]
) -> Setup:
    """Cache the data, load the base, attach an adapter per trial and build what moves them; nothing is trained yet.

    Args:
        trials_per_pass: adapters that share a forward; `auto` as many as memory has room for.

    Raises:
        TrainerError: the data, the base or the host is at fault.
    """
    shared, config = group.shared, group.shared.config
    family = open_family(shared.base)
    console.print("reading the cache; what it lacks is encoded now")
    cache = build_cache(config, family, shared.split, shared.base_digests, runtime, progress=console.track)
    console.print(f"cache: {cache.num_encoded} encoded now, {cache.latents.mean_NChw.shape[0]} latents in all")
    console.print(f"loading the {family.denoiser} on {runtime.device_name} in {runtime.precision}")
    with runtime.phase("loading", together=True):
        denoiser, trials = _load(group, family, runtime)
    batches, one_by_one = _batches(shared, cache, runtime), passes_of(trials, 1)
    optimizer_step = OptimizerStep(denoiser, batches, one_by_one, config, max_skips=group.max_skips)
    if trials_per_pass == "auto":
        with runtime.phase("forward", together=True):
            activations = optimizer_step.activation_bytes()
        trials_per_pass = int(from_main(runtime.launch, fitting_trials_per_pass(trials, activations, runtime)))
    passes = passes_of(trials, trials_per_pass)
    optimizer_step.pack(passes)
    if len(trials) > 1:
        console.print(f"trials per forward: {', '.join(str(len(members)) for members in passes)}")
    validation, planned = None, shared.plan.validation
    if config.validation is not None and planned is not None:
        with runtime.phase("loading", together=True):
            validator = Validator(denoiser, cache.probes, cache.prompts, config.validation)
        validation = ValidationSchedule(validator, passes, planned.every, group.num_steps, group.prune.diverged)
    return Setup(denoiser, cache.prompts, trials, trials_per_pass, optimizer_step, validation, group.num_steps)


def _load(group: TrialGroup, family: Family, runtime: Runtime) -> tuple[AdaptedDenoiser, tuple[Trial, ...]]:
    """The frozen base with an adapter per trial, and the trials."""
    shared, config = group.shared, group.shared.config
    model = family.load_denoiser(runtime.device, runtime.dtype)
    runs = {f"trial{index}": member.prepared for index, member in enumerate(group.members)}
    adapters = {name: peft_config(run.config.adapter, [*run.target_shapes]) for name, run in runs.items()}
    bank = AdapterBank(model, family.denoiser, adapters, seed=config.seed)
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train()

    schedule = shared.base.component_config("scheduler")
    weightings = config.objective.model_dump(exclude_none=True)
    path = noise_path(schedule, shared.prediction_type, weightings, runtime.device)
    denoiser = AdaptedDenoiser(family, bank, path, runtime)
    has_scale, device = runtime.precision == "fp16", runtime.device.type
    trials = tuple(
        Trial(
            run.config, name, bank.parameters(name), run.param_groups(), torch.amp.GradScaler(device, enabled=has_scale)
        )
        for name, run in runs.items()
    )
    return denoiser, trials


def fitting_trials_per_pass(trials: Sequence[Trial], activation_bytes: int, runtime: Runtime) -> int:
    """The most trials whose activations fit into memory beside gradients and optimizer states, passes of equal size.

    Args:
        activation_bytes: what one trial's forward keeps for its backward, measured.
    """
    num_parameters = sum(p.numel() for trial in trials for p in trial.parameters.values())
    room = runtime.free_bytes() * MEMORY_SHARE - num_parameters * 4 * STATE_COPIES
    most = min(len(trials), max(1, int(room // (activation_bytes * ACTIVATION_MARGIN))))
    num_passes = math.ceil(len(trials) / most)
    return math.ceil(len(trials) / num_passes)


def _batches(prepared: Prepared, cache: Cache, runtime: Runtime) -> BatchSource:
    config, plan = prepared.config, prepared.plan
    return BatchSource(
        records=prepared.dataset.records,
        samples=prepared.dataset.samples(),
        latents=cache.latents,
        prompts=cache.prompts,
        seed=config.seed,
        batch_size=plan.batch_size,
        accumulation=plan.accumulation,
        num_processes=plan.num_processes,
        caption_dropout=config.data.captions.dropout,
        device=runtime.device,
    )
