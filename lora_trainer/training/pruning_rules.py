"""Which trials of a group end at a probe, by the rules of `sweep.prune`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lora_trainer.config.sweep import PruneConfig
from lora_trainer.schedules.schedule import Horizon, to_updates
from lora_trainer.training.trial import Ending


@dataclass(frozen=True, slots=True)
class StopRules:
    """What the held-out losses of a probe decide; nothing unless set."""

    diverged: float | None = None
    """Loss over the base's from which a trial is stopped."""
    behind_at: int | None = None
    """The probe after this many updates keeps the best `keep` trials alone."""
    keep: int = 0

    @classmethod
    def of(cls, config: PruneConfig, horizon: Horizon, every: int) -> StopRules:
        """The rules of a group that is probed after every so many updates and after the last."""
        if config.behind is None:
            return cls(config.diverged)
        asked = to_updates(config.behind.at, horizon)
        return cls(config.diverged, -(-asked // every) * every, config.behind.keep)

    def endings(self, step: int, losses: Mapping[str, float]) -> dict[str, Ending]:
        """The trials that end after this update, with the reason.

        Args:
            losses: held-out losses of the live trials over the base's. Trials of equal loss are kept together.
        """
        found = {
            name: f"sweep.prune.diverged: held-out loss {loss:.4g} times the base's, {self.diverged:g} allowed"
            for name, loss in losses.items()
            if self.diverged is not None and loss >= self.diverged
        }
        if step == self.behind_at and (best := sorted(filter(math.isfinite, losses.values()))[: self.keep]):
            last = best[-1]
            for name, loss in losses.items():
                if not loss <= last:
                    reason = f"held-out loss {loss:.4g} at update {step}, the best {self.keep} had {last:.4g} or less"
                    found.setdefault(name, f"sweep.prune.behind: {reason} (equal-step bias accepted)")
        return {name: Ending(step, "stopped", reason) for name, reason in found.items()}
