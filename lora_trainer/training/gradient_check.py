"""Two checks of a young adapter: that every layer learns, or which do not and why.

B starts at zero, so at the first update only B has a gradient, and every B must have one. A follows once B is not zero:
after the second update with a learning rate above 0 every A and B must have left its initial value. Both fall in the
first updates; the steady loop pays nothing for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from lora_trainer.models.adapters.bank import AdapterBank
from lora_trainer.planning.run_plan import LRGroup
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
        yield _gradients(trial)
    if applied == _second_moving_update(trial):
        yield _movement(trial, bank, seed, step)


def _second_moving_update(trial: Trial) -> int | None:
    """The 1-based number of the second update in which any group has a learning rate above 0."""
    moving = 0
    for k in range(trial.groups[0].schedule.horizon.num_updates):
        moving += any(group.lr(k) > 0 for group in trial.groups)
        if moving == 2:
            return k + 1
    return None


def _gradients(trial: Trial) -> GradientCheck:
    tensors = {name: p for name, p in trial.parameters.items() if ".lora_B" in name}
    nonzero = [p.new_zeros(()) if p.grad is None else p.grad.count_nonzero().float() for p in tensors.values()]
    counts = torch.stack(nonzero).tolist()
    silent = [name for name, count in zip(tensors, counts, strict=True) if count == 0]
    reason = "its gradient is exactly 0: the layer takes no part in the forward pass, or its input is 0"
    return GradientCheck("every B has a gradient", len(tensors), dict.fromkeys(silent, reason))


def _movement(trial: Trial, bank: AdapterBank, seed: int, step: int) -> GradientCheck:
    tensors = {name: p.detach() for name, p in trial.parameters.items() if ".lora_A" in name or ".lora_B" in name}
    initial = bank.initial(trial.adapter, seed)
    moved = [(p != initial(name).to(p.device)).any() for name, p in tensors.items()]
    flags = torch.stack(moved).tolist()
    still = [name for name, flag in zip(tensors, flags, strict=True) if not flag]
    return GradientCheck(
        "every A and B has moved", len(tensors), {name: _reason(trial.group_of(name), step) for name in still}
    )


def _reason(group: LRGroup, step: int) -> str:
    """What the schedule says of a tensor that stayed as it was for the first `step` updates."""
    moving = sum(group.lr(k) > 0 for k in range(step))
    if moving == 0:
        return f"the LR of group {group.name} is 0 in the first {step} updates"
    return f"group {group.name} had one update with an LR above 0" if moving == 1 else UNEXPLAINED
