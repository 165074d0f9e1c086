"""Every learning-rate schedule by its name in the config (`lr_scheduler.type`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_trainer.schedules.classic import (
    Constant,
    ConstantWithWarmup,
    Cosine,
    CosineWithRestarts,
    Linear,
    Polynomial,
)
from lora_trainer.schedules.options import ScheduleOptions

SCHEDULES: dict[str, type[ScheduleOptions]] = {
    "constant": Constant,
    "constant_with_warmup": ConstantWithWarmup,
    "linear": Linear,
    "cosine": Cosine,
    "cosine_with_restarts": CosineWithRestarts,
    "polynomial": Polynomial,
}

LRSchedulerOptions = Annotated[
    Constant | ConstantWithWarmup | Linear | Cosine | CosineWithRestarts | Polynomial, Field(discriminator="type")
]
