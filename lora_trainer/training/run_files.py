"""What a run says of itself: files for people and for a rerun, and the recipe inside its LoRAs."""

from __future__ import annotations

from lora_trainer import __version__
from lora_trainer.config import places
from lora_trainer.config.load import to_yaml
from lora_trainer.config.schema import RunConfig
from lora_trainer.lora_files.files import BaseFacts, DataFacts, LoopFacts, Recipe
from lora_trainer.planning.prepare import Prepared
from lora_trainer.planning.run_plan import RunPlan
from lora_trainer.runtime.runtime import Runtime, environment_report
from lora_trainer.storage import atomic_files


def write_run_files(prepared: Prepared, runtime: Runtime) -> None:
    """config.yaml, plan.json, environment.json: what this run is, for people and for a rerun."""
    atomic_files.write_file(prepared.run_dir / places.CONFIG_FILE, to_yaml(prepared.config).encode())
    plan = prepared.plan.as_json() | {"identity": prepared.identity()}
    atomic_files.write_json(prepared.run_dir / places.PLAN_FILE, plan)
    atomic_files.write_json(prepared.run_dir / places.ENVIRONMENT_FILE, environment_report(runtime))
    if prepared.split.probes:
        sets = {"images_held_out": prepared.split.held_out, **prepared.split.probes}
        chosen = {name: [record.sha256 for record in records] for name, records in sets.items()}
        atomic_files.write_json(prepared.run_dir / places.VALIDATION_FILE, chosen)


def recipe_of(config: RunConfig, plan: RunPlan, base: BaseFacts, step: int) -> Recipe:
    """The recipe of a run after `step` updates."""
    train, data = config.train, config.data
    return Recipe(
        version=__version__,
        name=config.name,
        step=step,
        seed=config.seed,
        base=base,
        adapter=config.adapter,
        objective=config.objective,
        optimizer=config.optimizer,
        lr_scheduler=config.lr_scheduler,
        loop=LoopFacts(
            num_images=plan.num_images,
            num_samples=plan.num_samples,
            num_steps=plan.num_steps,
            steps_per_epoch=plan.steps_per_epoch,
            num_warmup_steps=plan.param_groups[0].num_warmup_steps,
            batch_size=plan.batch_size,
            accumulation=plan.accumulation,
            global_batch=plan.global_batch,
            max_grad_norm=train.max_grad_norm,
            ema_decay=train.ema_decay,
            gradient_checkpointing=train.gradient_checkpointing,
        ),
        data=DataFacts(
            resolution=data.resolution,
            random_crop=data.crop == "random",
            flip=data.flip,
            caption_dropout=data.captions.dropout,
        ),
    )
