"""Learning rates: starting points to paste, and what is unusual about those of a configuration.

Both are advice, never defaults that hide or errors: a data set may prove them wrong. A learning rate means nothing
without its optimizer, so the usual range belongs to the optimizer, and all of them are for LoRA: full fine-tuning takes
ten to twenty times less. docs/learning_rates.md says where the values come from and what they are worth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_trainer.config.optimizers import optimizer_row
from lora_trainer.config.schema import RunConfig

SMALL_SET, SMALL_SET_LR = 50, 5e-5


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings by dotted key, and what they are for."""

    purpose: str
    settings: dict[str, Any]

    def overrides(self) -> list[str]:
        """The settings as words for the command line."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.settings.items()}
        return [f"{key}={text}" for key, text in texts.items()]


PRESETS: dict[str, Preset] = {
    "lora": Preset("LoRA with AdamW on SD 1.x and 2.x: the default", {"optimizer.type": "adamw", "optimizer.lr": 1e-4}),
    "general": Preset("when 1e-4 overfits early or the set is small", {"optimizer.lr": 5e-5}),
    "conservative": Preset("when the base should change as little as possible", {"optimizer.lr": 4e-5}),
    "full": Preset(
        "what full fine-tuning of all weights uses; for a LoRA it is 10-20 times too small", {"optimizer.lr": 5e-6}
    ),
    "bert": Preset(
        "a warm-up over whole epochs, then straight down to zero",
        {"lr_scheduler": {"type": "linear", "warmup_steps": "1ep"}},
    ),
    "character": Preset(
        "10-40 pictures of one subject on SD 1.5",
        {"optimizer.lr": 1e-4, "lr_scheduler": {"type": "cosine", "warmup_steps": "5%"}, "adapter.rank": 16},
    ),
    "style": Preset(
        "50-500 pictures of one style on SD 1.5",
        {"optimizer.lr": 1e-4, "lr_scheduler": {"type": "linear", "warmup_steps": "5%"}, "adapter.rank": 32},
    ),
    "lion": Preset(
        "Lion: a third to a tenth of AdamW's learning rate, more weight decay",
        {"optimizer": {"type": "lion", "lr": 2e-5, "weight_decay": 0.1}},
    ),
    "adafactor": Preset(
        "Adafactor with the relative step of its paper, written out: 1e-2 times the size of each tensor",
        {"optimizer": {"type": "adafactor", "lr": 1e-2, "scale_parameter": True}, "lr_scheduler": {"type": "constant"}},
    ),
    "prodigy": Preset(
        "Prodigy finds the step size itself: base 1, one schedule over the whole run",
        {"optimizer": {"type": "prodigy", "lr": 1.0}, "lr_scheduler": {"type": "cosine"}},
    ),
    "schedule_free": Preset(
        "schedule-free AdamW: no schedule at all, a larger learning rate, its own warm-up",
        {
            "optimizer": {"type": "schedule_free_adamw", "lr": 2.5e-4, "warmup_steps": "5%"},
            "lr_scheduler": {"type": "constant"},
        },
    ),
    "sgd": Preset("SGD with momentum: learning rates far above Adam's", {"optimizer": {"type": "sgd", "lr": 0.1}}),
}
"""When evidence ties, the smaller learning rate wins."""


def unusual_rates(config: RunConfig, peaks: Mapping[str, float] | None = None) -> Iterator[str]:
    """A sentence for each LR outside of its optimizer's usual range.

    Args:
        peaks: the highest LR of each group over the run, by its name, where that is known.
    """
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
    for name, peak in (peaks or {}).items():
        if peak > high and max(rates.values()) <= high:
            yield f"the LR of {name} peaks at {peak:g}, above {usual}, as its schedule multiplies it: it may diverge"


def small_set_note(config: RunConfig, num_images: int) -> str | None:
    """For few images and a learning rate that is large for them; None where there is nothing to say."""
    lr = config.optimizer.lr
    if num_images > SMALL_SET or not config.optimizer.type.startswith("adam") or lr <= SMALL_SET_LR:
        return None
    return (
        f"{num_images} images are few, and their gradients are noisy: if it overfits, try "
        f"optimizer.lr={SMALL_SET_LR:g} or fewer updates first"
    )
