"""Every optimizer by its name in the config (`optimizer.type`), built from its options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lora_trainer.config.optimizers import OptimizerOptions

Parameters = Iterable[torch.nn.Parameter]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


def build_optimizer(options: OptimizerOptions, parameters: Parameters) -> torch.optim.Optimizer:
    """The optimizer over these parameters; its options have the names of torch's own arguments."""
    arguments: dict[str, Any] = options.model_dump(exclude={"type"})
    return OPTIMIZERS[options.type](list(parameters), **arguments)
