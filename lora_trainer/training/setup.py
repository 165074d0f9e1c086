"""What a run computes with, put together from its plan: the same for training and for the learning-rate finder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lora_trainer.config.schema import LoraConfig
from lora_trainer.data.batches import BatchSource
from lora_trainer.data.cache import Cache, build_cache
from lora_trainer.diffusion.objective import Objective
from lora_trainer.models.adapters.bank import AdapterBank, AdapterSpec
from lora_trainer.models.adapters.targets import select_targets
from lora_trainer.models.registry import open_family
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.planning.prepare import Prepared
from lora_trainer.runtime.runtime import Runtime
from lora_trainer.tracking.console import Screen
from lora_trainer.training.optimizer_step import Updater
from lora_trainer.training.trial import Trial, TrialSpec, passes_of
from lora_trainer.training.validation import Validator

MEMORY_SHARE = 0.7
"""Of the free memory: the rest is for the workspaces of kernels and for other processes."""
STATE_COPIES = 4  # gradient, two moments, average: in fp32
ACTIVATION_MARGIN = 1.5  # gradients of activations come on top of what the forward keeps


@dataclass(frozen=True, slots=True)
class Assembly:
    """The frozen base, the trials on it, and what updates and measures them."""

    family: StableDiffusion
    cache: Cache
    denoiser: nn.Module
    bank: AdapterBank
    trials: tuple[Trial, ...]
    passes: tuple[tuple[Trial, ...], ...]
    """The trials of each forward."""
    trials_per_pass: int
    """The most that share one."""
    updater: Updater
    validator: Validator | None
    """None where the config has no validation section."""


def assemble(
    prepared: Prepared,
    specs: Sequence[TrialSpec],
    runtime: Runtime,
    screen: Screen,
    *,
    trials_per_pass: int | Literal["auto"] = 1,
    drop_failed: bool = False,
) -> Assembly:
    """Cache the data, load the base, attach an adapter per trial and build what moves them; nothing is trained yet.

    Args:
        trials_per_pass: adapters that share a forward; `auto` as many as memory has room for.
        drop_failed: see `Updater`.

    Raises:
        TrainerError: the data, the base or the host is at fault.
    """
    config, plan = prepared.config, prepared.plan
    family = open_family(prepared.base)
    cache = build_cache(config, family, prepared.split, prepared.base_digests, runtime, screen.track)
    _say_cache(cache, screen)
    denoiser = family.load_denoiser(runtime.device, runtime.dtype)
    adapters = {f"trial{index}": _adapter(prepared, spec.config.adapter) for index, spec in enumerate(specs)}
    bank = AdapterBank.attach(denoiser, adapters, seed=config.seed)
    if config.train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()

    trials = tuple(Trial.build(spec, bank, name, plan) for spec, name in zip(specs, adapters, strict=True))
    passes = passes_of(trials, 1)
    objective = Objective(config.objective, family.noise_schedule, prepared.prediction_type, runtime.device)
    updater = Updater(
        family,
        bank,
        passes,
        _batches(prepared, cache, runtime),
        objective,
        runtime,
        seed=config.seed,
        accumulation=plan.accumulation,
        base_loss_every=config.tracking.base_loss_every,
        drop_failed=drop_failed,
    )
    per_pass: int
    if trials_per_pass == "auto":
        per_pass = runtime.from_main(fitting_trials_per_pass(trials, updater.activation_bytes(), runtime))
    else:
        per_pass = trials_per_pass
    updater.pack(passes := passes_of(trials, per_pass))
    validator = _validator(prepared, family, bank, cache, objective, runtime)
    return Assembly(family, cache, denoiser, bank, trials, passes, per_pass, updater, validator)


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


def _adapter(prepared: Prepared, config: LoraConfig) -> AdapterSpec:
    return AdapterSpec(config, tuple(select_targets(prepared.base.denoiser_shapes(), config.targets)))


def _batches(prepared: Prepared, cache: Cache, runtime: Runtime) -> BatchSource:
    config, plan = prepared.config, prepared.plan
    return BatchSource(
        prepared.dataset.records,
        prepared.dataset.samples(),
        cache.latents,
        cache.prompts,
        seed=config.seed,
        batch_size=plan.batch_size,
        accumulation=plan.accumulation,
        num_processes=plan.num_processes,
        caption_dropout=config.data.captions.dropout,
        device=runtime.device,
    )


def _validator(
    prepared: Prepared,
    family: StableDiffusion,
    bank: AdapterBank,
    cache: Cache,
    objective: Objective,
    runtime: Runtime,
) -> Validator | None:
    config = prepared.config.validation
    if config is None:
        return None
    return Validator(
        family, bank, cache.probes, cache.prompts, objective, runtime, seed=config.seed, batch_size=config.batch_size
    )


def _say_cache(cache: Cache, screen: Screen) -> None:
    if cache.num_cut_captions:
        screen.say(f"{cache.num_cut_captions} captions are longer than the text encoder reads and were cut")
    screen.say(f"cache: {cache.num_encoded} encoded now, {cache.latents.mean_NChw.shape[0]} latents in all")
