"""Every optimizer by its name in the config (`optimizer.type`), built from its options.

Those that are not torch's own come from well-kept packages, imported only where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_trainer.config.optimizers import OptimizerOptions, ScheduleFreeAdamW
from lora_trainer.runtime.optional import require
from lora_trainer.schedules.durations import Horizon, to_updates

Groups = list[dict[str, Any]]


def _torch(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Our option names are torch's argument names."""
    return lambda groups, options, _: kind(groups, **_arguments(options))


def _adafactor(groups: Groups, options: OptimizerOptions, _: Horizon) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, relative_step=False, warmup_init=False, **_arguments(options))


def _lion(groups: Groups, options: OptimizerOptions, _: Horizon) -> torch.optim.Optimizer:
    package = require("lion_pytorch", extra="optimizers", feature="optimizer.type: lion")
    return package.Lion(groups, **_arguments(options))


def _adamw_8bit(groups: Groups, options: OptimizerOptions, _: Horizon) -> torch.optim.Optimizer:
    package = require("bitsandbytes", extra="8bit", feature="optimizer.type: adamw_8bit")
    return package.optim.AdamW8bit(groups, **_arguments(options))


def _prodigy(groups: Groups, options: OptimizerOptions, _: Horizon) -> torch.optim.Optimizer:
    package = require("prodigyopt", extra="optimizers", feature="optimizer.type: prodigy")
    return package.Prodigy(groups, **_arguments(options))


def _schedule_free(groups: Groups, options: OptimizerOptions, horizon: Horizon) -> torch.optim.Optimizer:
    assert isinstance(options, ScheduleFreeAdamW)
    package = require("schedulefree", extra="optimizers", feature="optimizer.type: schedule_free_adamw")
    arguments = _arguments(options) | {"warmup_steps": to_updates(options.warmup_steps, horizon)}
    optimizer = package.AdamWScheduleFree(groups, **arguments)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, Callable[[Groups, Any, Horizon], torch.optim.Optimizer]] = {
    "adamw": _torch(torch.optim.AdamW),
    "adam": _torch(torch.optim.Adam),
    "sgd": _torch(torch.optim.SGD),
    "rmsprop": _torch(torch.optim.RMSprop),
    "adagrad": _torch(torch.optim.Adagrad),
    "adafactor": _adafactor,
    "lion": _lion,
    "adamw_8bit": _adamw_8bit,
    "prodigy": _prodigy,
    "schedule_free_adamw": _schedule_free,
}


def build_optimizer(
    options: OptimizerOptions, groups: Sequence[Sequence[torch.nn.Parameter]], horizon: Horizon
) -> torch.optim.Optimizer:
    """The optimizer over groups of parameters.

    Raises:
        HostError: its package is not installed; the message names the extra.
    """
    return OPTIMIZERS[options.type]([{"params": list(group)} for group in groups], options, horizon)


def evaluated_weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor] | None:
    """What a schedule-free optimizer would have evaluated and saved, in the order of its parameters; None for others.

    The optimizer's own switch between the two modes rounds, so the training weights are put back bit by bit.
    """
    if not callable(getattr(optimizer, "eval", None)):
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    training = [p.detach().clone() for p in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    evaluated = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, own in zip(parameters, training, strict=True):
            parameter.copy_(own)
    for group in optimizer.param_groups:
        group["train_mode"] = True
    return evaluated


def step_size(optimizer: torch.optim.Optimizer) -> float | None:
    """The estimate d of a parameter-free optimizer: its effective learning rate is d x LR; None for others."""
    estimate = optimizer.param_groups[0].get("d")
    return None if estimate is None else float(estimate)


def _arguments(options: OptimizerOptions) -> dict[str, Any]:
    return options.model_dump(exclude={"type", "groups"})
