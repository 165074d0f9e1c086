"""Every model family by its name in the config (`model.family`), and how a base is opened. Never imports torch."""

from __future__ import annotations

from importlib.metadata import entry_points

from lora_trainer.errors import ModelError, Problem
from lora_trainer.models.family import Family
from lora_trainer.models.folder import BaseFolder, locate_base, missing_parts, pipeline_name
from lora_trainer.models.noise_scheduler import schedule_problems
from lora_trainer.models.stable_diffusion import StableDiffusion

ENTRY_POINTS = "lora_trainer.families"
FAMILIES: tuple[type[Family], ...] = (StableDiffusion,)


def families() -> dict[str, type[Family]]:
    """Ours, and those that installed packages offer under the entry point group `lora_trainer.families`."""
    outside = [entry.load() for entry in entry_points(group=ENTRY_POINTS)]
    return {family.name: family for family in (*outside, *FAMILIES)}


def open_base(
    path: str, revision: str | None = None, family: str = "auto", prediction_type: str = "auto"
) -> BaseFolder:
    """Find a base, and check that it is whole and of a known family, and of which.

    Args:
        prediction_type: as `model.prediction_type` asks for it.

    Raises:
        ModelError: it is not there or something else (it says what), or parts are missing or damaged (it names each).
    """
    known = families()
    if family not in ("auto", *known):
        raise ModelError(Problem(f"`{family}` is no family", "model.family", fix=f"known: auto, {', '.join(known)}"))
    wanted = {part for kind in known.values() for part in (*kind.models, *kind.others)}
    folder = locate_base(path, revision, sorted(wanted))
    pipeline = pipeline_name(folder)
    matching = next((kind for kind in known.values() if pipeline in kind.pipelines), None)
    if matching is None:
        names = ", ".join(name for kind in known.values() for name in kind.pipelines)
        where = str(folder / "model_index.json")
        raise ModelError(Problem(f"a `{pipeline}` is not supported", where, fix=f"use a base for one of: {names}"))
    if family not in ("auto", matching.name):
        what = f"model.family is {family}, but the base is {matching.name}"
        raise ModelError(Problem(what, str(folder), fix="write auto"))
    base = BaseFolder(folder, matching.name, matching.denoiser, matching.models, matching.others, prediction_type)
    missing = missing_parts(base)
    if problems := missing or [*schedule_problems(base, matching.prediction_types), *matching(base).problems()]:
        raise ModelError(*problems)
    return base


def open_family(base: BaseFolder) -> Family:
    """The family object of an inspected base."""
    return families()[base.family](base)
