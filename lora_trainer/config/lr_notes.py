"""What is unusual about the learning rates of a configuration. Notes, never errors: a data set may prove them wrong.

A learning rate means nothing without its optimizer, so the usual range belongs to the optimizer, and all of them are
for LoRA: full fine-tuning takes ten to twenty times less. docs/learning_rates.md says where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_trainer.config.optimizers import optimizer_row
from lora_trainer.config.schema import RunConfig

SMALL_SET, SMALL_SET_LR = 50, 5e-5


def unusual_rates(config: RunConfig) -> Iterator[str]:
    """A sentence for each base LR outside of its optimizer's usual range."""
    kind = config.optimizer.type
    low, high = optimizer_row(kind).usual_lr
    rates = {"optimizer.lr": config.optimizer.lr}
    rates |= {f"the LR of group {group.name}": group.lr for group in config.optimizer.groups if group.lr is not None}
    usual = f"the usual range of {kind} ({low:g} to {high:g})"
    for name, lr in rates.items():
        if lr > high:
            yield f"{name} {lr:g} is above {usual}: the loss may swing or diverge"
        if lr < low:
            yield f"{name} {lr:g} is below {usual}: training may hardly move"


def small_set_note(config: RunConfig, num_images: int) -> str | None:
    """For few images and a learning rate that is large for them; None where there is nothing to say."""
    lr = config.optimizer.lr
    if num_images > SMALL_SET or not config.optimizer.type.startswith("adam") or lr <= SMALL_SET_LR:
        return None
    return (
        f"{num_images} images are few, and their gradients are noisy: if it overfits, try "
        f"optimizer.lr={SMALL_SET_LR:g} or fewer updates first"
    )
