"""Build the optimizer that a config names, and read what is special about some of them."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence

import torch

from lora_trainer.config.optimizers import OptimizerOptions, cannot_build, optimizer_row
from lora_trainer.errors import SystemSetupError
from lora_trainer.schedules.schedule import Horizon


def build_optimizer(
    options: OptimizerOptions, groups: Sequence[Sequence[torch.nn.Parameter]], horizon: Horizon
) -> torch.optim.Optimizer:
    """Build the optimizer over groups of parameters, ready to train.

    Raises:
        SystemSetupError: its package is not installed; the message names the extra.
    """
    row = optimizer_row(options.type)
    try:
        build = pkgutil.resolve_name(row.build)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemSetupError(cannot_build(row, str(error))) from error
    optimizer = build([{"params": list(group)} for group in groups], **options.arguments(horizon))
    if callable(getattr(optimizer, "train", None)):  # a schedule-free one starts in neither of its modes
        optimizer.train()
    return optimizer


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
        for parameter, weights in zip(parameters, training, strict=True):
            parameter.copy_(weights)
    for group in optimizer.param_groups:
        group["train_mode"] = True
    return evaluated


def step_size(optimizer: torch.optim.Optimizer) -> float | None:
    """The estimate d of a parameter-free optimizer: its effective learning rate is d x LR; None for others."""
    estimate = optimizer.param_groups[0].get("d")
    return None if estimate is None else float(estimate)
