"""Every model family by its name in the config (`model.family`)."""

from __future__ import annotations

from lora_trainer.models.folder import BaseFolder
from lora_trainer.models.stable_diffusion import StableDiffusion

FAMILIES: dict[str, type[StableDiffusion]] = {"sd": StableDiffusion}


def open_family(base: BaseFolder) -> StableDiffusion:
    """The family object of an inspected base."""
    return FAMILIES[base.family](base)
