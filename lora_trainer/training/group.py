"""What one call of `fit` trains: trials that share base, batches, noise and validation. A solo run is a group of one.

Plain data: a group can be written to JSON and trained by another process. Never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from lora_trainer.config.places import CHECKPOINTS
from lora_trainer.config.sweep_schema import PruneConfig
from lora_trainer.config.trials import TrialConfig
from lora_trainer.planning.prepare import Prepared


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The first `step` updates are those of `parent`, another trial of the group."""

    parent: str
    step: int


@dataclass(frozen=True, slots=True)
class Member:
    """A trial of a group."""

    trial: TrialConfig
    prepared: Prepared
    prefix: SharedPrefix | None = None

    @property
    def name(self) -> str:
        return self.trial.name


@dataclass(frozen=True, slots=True)
class TrialGroup:
    """The unit of placement on a device and of a checkpoint."""

    name: str
    folder: Path
    """Where its checkpoints lie; a solo run's directory."""
    members: tuple[Member, ...]
    trials_per_pass: int | Literal["auto"] = 1
    """Adapters that share a forward."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    max_skips: int = 3
    """Updates in a row with non-finite numbers after which a trial has failed."""
    log_only: bool = False
    """Write logs and nothing else: no checkpoints, exports, samples or diagnosis."""
    why: str | None = None
    """What separates it from the group before it with the same seed."""

    @property
    def shared(self) -> Prepared:
        """Any member's: what they share is equal."""
        return self.members[0].prepared

    @property
    def num_steps(self) -> int:
        return self.shared.plan.num_steps

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def has_begun(self) -> bool:
        """Whether it has a checkpoint; from then on its members are fixed."""
        return any(self.checkpoints.glob("step-*"))

    def to_json(self) -> bytes:
        return TypeAdapter(TrialGroup).dump_json(self, indent=2, by_alias=True)

    @classmethod
    def from_json(cls, content: bytes) -> TrialGroup:
        return TypeAdapter(TrialGroup).validate_json(content)


def solo_group(prepared: Prepared) -> TrialGroup:
    """The group of a run that is trained alone: its folder is the run directory."""
    trial = TrialConfig(prepared.config.name, "base", {}, prepared.config)
    return TrialGroup(prepared.config.name, prepared.run_dir, (Member(trial, prepared),))
