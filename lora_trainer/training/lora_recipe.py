"""The recipe of a run, as its LoRA files carry it."""

from __future__ import annotations

from lora_trainer import __version__
from lora_trainer.config.schema import RunConfig
from lora_trainer.lora_files.recipe import BaseFacts, DataFacts, LoopFacts, Recipe
from lora_trainer.planning.run_plan import RunPlan


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
            num_updates=plan.num_updates,
            updates_per_epoch=plan.updates_per_epoch,
            warmup_updates=plan.lr_groups[0].warmup_updates,
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
