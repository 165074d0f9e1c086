"""What must be known of a run besides its log: its length and its settings."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.config.schema import RunConfig
from lora_trainer.evidence.diagnosis.lr_history import share_of_peak
from lora_trainer.planning.run_plan import RunPlan


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Length and settings of one trial's run."""

    num_updates: int
    updates_per_epoch: int
    final_multiplier: float
    """LR of the last update as a share of the highest: what the schedule has in store."""
    config: RunConfig

    @classmethod
    def of(cls, plan: RunPlan, config: RunConfig) -> RunFacts:
        """Those of a planned run; its first group of weights stands for all."""
        group = plan.lr_groups[0]
        final = share_of_peak(group.lr_end, group.lr_peak)
        return cls(plan.num_updates, plan.updates_per_epoch, final, config)
