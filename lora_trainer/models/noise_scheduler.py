"""Whether a base's scheduler settings are a noise schedule that can be trained on. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lora_trainer.errors import Problem
from lora_trainer.models.folder import BaseFolder

BETA_SCHEDULERS = (
    *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep"),
    *("DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete"),
    *("HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD"),
    "UniPCMultistep",
)
"""diffusers' schedulers, without the ending, that make of `beta_*` the betas that its DDPMScheduler makes."""
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SPACINGS = ("leading", "linspace", "trailing")


def schedule_problems(base: BaseFolder, prediction_types: Sequence[str]) -> Iterator[Problem]:
    """What in the scheduler's settings is no noise schedule that a family trains on and draws samples by."""
    settings, where = base.component_config("scheduler"), str(base.path / "scheduler" / "scheduler_config.json")
    named, fix = str(settings.get("_class_name")), "fetch the base's own scheduler folder"
    if named.startswith("FlowMatch") and "flow" in prediction_types:
        return
    if settings.get("use_flow_sigmas") or named.removesuffix("Scheduler") not in BETA_SCHEDULERS:
        what = f"the scheduler `{named}` has no noise schedule of betas, on which the family {base.family} is trained"
        yield Problem(what, where, fix=fix)
        return
    num, trained = settings.get("num_train_timesteps", 1000), settings.get("trained_betas")
    start, end, kind = (settings.get(key) for key in ("beta_start", "beta_end", "beta_schedule"))
    is_listed = isinstance(trained, list) and len(trained) == num and all(map(_is_beta, trained))
    has_ends = trained is None and kind != "squaredcos_cap_v2"
    for key, wanted, is_so in (
        ("num_train_timesteps", "2 to 100,000", type(num) is int and 1 < num <= 100_000),
        ("rescale_betas_zero_snr", "true or false", settings.get("rescale_betas_zero_snr") in (None, False, True)),
        ("timestep_spacing", ", ".join(_SPACINGS), settings.get("timestep_spacing", "leading") in _SPACINGS),
        ("steps_offset", "0 or 1", settings.get("steps_offset", 0) in (0, 1)),
        ("trained_betas", "a number in 0..1 for each timestep", trained is None or is_listed),
        ("beta_schedule", ", ".join(_BETA_SCHEDULES), trained is not None or kind in _BETA_SCHEDULES),
        ("beta_start", "a number in 0..1", not has_ends or _is_beta(start)),
        ("beta_end", "a number from beta_start to 1", not has_ends or (_is_beta(start) and _is_beta(end, start))),
    ):
        if not is_so:
            what = f"`{key}` is {str(settings.get(key, 'missing'))[:60]}; expected: {wanted}"
            yield Problem(what, where, fix=fix)


def _is_beta(value: Any, least: Any = 0) -> bool:
    return type(value) in (float, int) and 0 < value < 1 and value >= least
