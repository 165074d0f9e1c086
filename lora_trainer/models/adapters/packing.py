"""Which adapters can share a forward. Never imports torch."""

from __future__ import annotations

from lora_trainer.config.schema import LoraConfig


def can_pack(config: LoraConfig) -> bool:
    """Whether adapters of this kind can share a pass: plain and rank-stabilised LoRA without dropout.

    DoRA rescales the base's weight itself, and dropout draws from torch's global stream, trial by trial.
    """
    return not (config.use_dora or config.dropout)
