"""The plan of a run in words, with what is noteworthy about it. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lora_trainer.config import places
from lora_trainer.config.learning_rates import small_set_note, unusual_rates
from lora_trainer.config.schema import RunConfig
from lora_trainer.models.adapters.targets import kohya_notes
from lora_trainer.models.registry import open_family
from lora_trainer.planning.memory import memory_rows
from lora_trainer.planning.prepare import Prepared
from lora_trainer.planning.run_plan import RunPlan

MANY_EPOCHS, FEW_STEPS = 200, 50


def plan_rows(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """The plan in words, row by row."""
    config, plan, dataset = prepared.config, prepared.plan, prepared.dataset
    repeats = f", {plan.num_samples} samples with repeats" if plan.num_samples != plan.num_images else ""
    yield "images", f"{plan.num_images}{repeats}, {config.data.resolution} px"
    for note in dataset.notes:
        yield "", note
    split = f"{plan.num_processes} process(es) x batch {plan.batch_size} x accumulation {plan.accumulation}"
    yield "global batch", f"{plan.global_batch} = {split}"
    yield (
        "updates per epoch",
        f"{plan.steps_per_epoch} = {plan.num_samples} samples / {plan.global_batch}, rounded up"
        + ("" if len(plan.bucket_sizes) == 1 else f" in each of {len(plan.bucket_sizes)} buckets"),
    )
    yield "updates", f"{plan.num_steps} ({plan.num_epochs:.2f} epochs), warmup {plan.param_groups[0].num_warmup_steps}"
    if plan.num_lr_steps is not None:
        yield "", f"the LR curve keeps its first length, {plan.num_lr_steps} updates, and then its last value"
    for group in plan.param_groups:
        name = "learning rate" if len(plan.param_groups) == 1 else f"LR of {group.name}"
        rates = f"start {group.lr_start:.3e}, peak {group.lr_peak:.3e}, last {group.lr_end:.3e}"
        yield name, f"{group.schedule}: {rates}; budget {group.lr_budget:.2f}"
        yield from (("", f"warning: {warning}") for warning in group.warnings)
    yield "optimizer", f"{config.optimizer.type}, weight decay {config.optimizer.weight_decay:g}"
    kind = "DoRA" if config.adapter.use_dora else "LoRA"
    scale = "alpha / sqrt(rank)" if config.adapter.use_rslora else "alpha / rank"
    yield "adapter", f"{kind} rank {config.adapter.rank}, {scale} with alpha {config.adapter.alpha:g}"
    targets = config.adapter.targets if isinstance(config.adapter.targets, str) else "patterns"
    yield "", f"{plan.num_modules} layers ({targets}), {plan.num_parameters:,} trainable parameters"
    yield "base", f"{prepared.base.family}, {prepared.prediction_type}, {config.model.path}"
    if plan.validation is not None:
        probes = ", ".join(f"{len(records)} {name}" for name, records in prepared.split.probes.items())
        every = f"every {plan.validation.every} updates, {plan.validation.num_measurements} times"
        yield "validation", f"{probes} images x 16 timesteps {every}: {plan.validation.cost:.1%} of the training's cost"
        yield from (("", f"note: {note}") for note in plan.validation.notes)
    yield from memory_rows(prepared)
    yield from (("note", note) for note in notes(prepared))
    yield "saves", _saves(plan)
    run_dir = places.run_directory(config)
    names = ", ".join(str(file.relative_to(run_dir)) for file in files_to_come(config))
    yield "files to come", f"{names} in {run_dir}"
    presets = open_family(prepared.base).target_presets
    yield from (("", f"note: {note}") for note in kohya_notes(config.adapter, prepared.target_shapes, presets))


def notes(prepared: Prepared) -> Iterator[str]:
    """What is allowed and seldom meant."""
    config, plan = prepared.config, prepared.plan
    yield from unusual_rates(config, {group.name: group.lr_peak for group in plan.param_groups})
    if note := small_set_note(config, plan.num_images):
        yield note
    if plan.global_batch > plan.num_samples:
        asked = f"a global batch of {plan.global_batch} is more than the set of {plan.num_samples} samples"
        yield f"{asked}: each update sees all of them and no more"
    seen = plan.num_steps * min(plan.global_batch, plan.num_samples) / plan.num_samples
    if seen > MANY_EPOCHS:
        yield f"each sample is seen {seen:,.0f} times: a LoRA has usually overfit long before; lower train.max_steps"
    if plan.num_steps < FEW_STEPS:
        yield f"{plan.num_steps} updates are few: a LoRA hardly learns a subject in fewer than {FEW_STEPS}"
    if prepared.precision == "fp16" and prepared.devices[0].gpu is None:
        yield "fp16 on a CPU saves memory alone: it is slower than fp32, and less exact; auto is fp32 here"
    if config.tracking.tensorboard and find_spec("tensorboard") is None:
        yield "the package tensorboard is missing, so there will be no events: pip install tensorboard"


def files_to_come(config: RunConfig) -> list[Path]:
    """What lies in the run directory in the end."""
    return [*results_to_come(config), places.run_directory(config) / places.CURVES_FILE, places.report_file(config)]


def results_to_come(config: RunConfig) -> list[Path]:
    """The same without the pictures that can be drawn from it at any time: what a trial of a sweep leaves."""
    run_dir = places.run_directory(config)
    samples = [run_dir / places.SAMPLES / places.GRID_FILE] if config.sample.prompts else []
    return [places.lora_file(config), places.diffusers_lora_file(config), run_dir / places.METRICS_FILE, *samples]


def _saves(plan: RunPlan) -> str:
    periods = {"checkpoint": plan.periods.checkpoint, "sample": plan.periods.sample, "export": plan.periods.export}
    listed = [f"{name} every {period}" for name, period in periods.items() if period]
    return ", ".join([*listed, "all at the end"])
