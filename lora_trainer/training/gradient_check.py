"""Two checks of a young adapter: that every layer learns, or which do not and why.

B starts at zero, so at the first update only B has a gradient, and every B must have one. A follows once B is not zero:
after the second update with a learning rate above 0 every A and B must have left its initial value. Both fall in the
first updates; the steady loop pays nothing for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch

from lora_trainer.models.adapters.bank import AdapterBank
from lora_trainer.planning.run_plan import ParamGroup
from lora_trainer.training.trial import Trial

UNEXPLAINED = "nothing in the schedule explains it"


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """What one check found: how many tensors must show the claim, and why those that do not may not."""

    claim: Literal["every B has a gradient", "every A and B has moved"]
    num_tensors: int
    missing: dict[str, str]
    """Reason by tensor."""


def checks_due(trial: Trial, bank: AdapterBank, seed: int, step: int) -> Iterator[GradientCheck]:
    """The checks that fall after this many updates, the last of which was applied and still has its gradients."""
    applied = step - trial.skips.total
    if applied == 1:
        up = {name: p for name, p in trial.parameters.items() if ".lora_B" in name}
        flags = {name: (p.new_zeros(1) if p.grad is None else p.grad).any() for name, p in up.items()}
        reason = "its gradient is exactly 0: the layer takes no part in the forward pass, or its input is 0"
        yield GradientCheck("every B has a gradient", len(flags), dict.fromkeys(_unset(flags), reason))
    if applied == _second_moving_update(trial):
        initial = bank.initial(trial.adapter, seed)
        weights = {name: p.detach() for name, p in trial.parameters.items() if ".lora_A" in name or ".lora_B" in name}
        flags = {name: (p != initial(name).to(p.device)).any() for name, p in weights.items()}
        reasons = {name: _reason(trial.param_group_of[name], step) for name in _unset(flags)}
        yield GradientCheck("every A and B has moved", len(flags), reasons)


def _unset(flags: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the flags that are False; one wait for the device."""
    values = torch.stack([*flags.values()]).tolist()
    return [name for name, value in zip(flags, values, strict=True) if not value]


def _second_moving_update(trial: Trial) -> int | None:
    """The 1-based number of the second update in which any group has a learning rate above 0."""
    num_steps = trial.param_groups[0].schedule.horizon.num_steps
    moving = (k + 1 for k in range(num_steps) if any(group.lr(k) > 0 for group in trial.param_groups))
    return next(islice(moving, 1, None), None)


def _reason(group: ParamGroup, step: int) -> str:
    """What the schedule says of a tensor that stayed as it was for the first `step` updates."""
    moving = sum(group.lr(k) > 0 for k in range(step))
    if moving == 0:
        return f"the LR of group {group.name} is 0 in the first {step} updates"
    return f"group {group.name} had one update with an LR above 0" if moving == 1 else UNEXPLAINED
