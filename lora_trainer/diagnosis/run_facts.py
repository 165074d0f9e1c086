"""What must be known of a run besides its log: its length and its settings."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Length and settings of one trial's run."""

    num_updates: int
    updates_per_epoch: int
    config: RunConfig
