"""How a LoRA was made, as it travels inside its file: enough to write either layout's metadata again.

Nothing that names a person, a machine, a path, a prompt or a moment: two equal runs give byte-equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lora_trainer.config.optimizers import AnyOptimizerOptions
from lora_trainer.config.schema import LoraConfig, ObjectiveConfig
from lora_trainer.schedules.registry import LRSchedulerOptions
from lora_trainer.strict_model import StrictModel

OWN_KEY = "lora_trainer"


class BaseFacts(StrictModel):
    """What a LoRA file says of the base it belongs to."""

    kohya_version: str
    architecture: str
    prediction_type: str


class LoopFacts(StrictModel):
    """Counts of the run."""

    num_images: int
    num_samples: int
    num_updates: int
    updates_per_epoch: int
    warmup_updates: int
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
    """Everything that the metadata of a LoRA file is made from."""

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
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)


def read_recipe(metadata: Mapping[str, Any]) -> Recipe | None:
    """The recipe in a LoRA file's metadata; None if the file is not ours or its recipe is not understood."""
    try:
        return Recipe.model_validate_json(metadata.get(OWN_KEY, ""))
    except ValidationError:
        return None
