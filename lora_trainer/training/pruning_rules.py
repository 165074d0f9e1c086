"""Which trials end at a probe, by `sweep.prune`."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.training.trial import Ending


@dataclass(frozen=True, slots=True)
class PruningRules:
    """What the held-out loss of a probe decides; nothing unless set."""

    diverged: float | None = None
    """Loss over the base's from which a trial is stopped."""

    def ending(self, step: int, relative: float) -> Ending | None:
        """How a trial ends after this update, given its held-out loss over the base's; None where it goes on."""
        if self.diverged is None or not relative >= self.diverged:
            return None
        reason = f"held-out loss {relative:.4g} times the base's, {self.diverged:g} allowed"
        return Ending(step, "stopped", f"sweep.prune.diverged: {reason}")
