"""Every learning-rate schedule by its name in the config (`lr_scheduler.type`)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from lora_trainer.schedules.classic import (
    Constant,
    ConstantWithWarmup,
    Cosine,
    CosineWithRestarts,
    Linear,
    Polynomial,
)
from lora_trainer.schedules.decays import (
    Exponential,
    InverseSqrt,
    MultiStep,
    PiecewiseConstant,
    Rex,
    Step,
    WarmupStableDecay,
)
from lora_trainer.schedules.durations import Duration, Horizon, ScheduleError, at_least_one
from lora_trainer.schedules.external import PluginSchedule, TorchSchedule
from lora_trainer.schedules.options import ScheduleOptions
from lora_trainer.schedules.periodic import CosineAnnealing, CosineWarmRestarts, Cyclic, OneCycle
from lora_trainer.schedules.plateau import Plateau
from lora_trainer.schedules.schedule import Core, LRSchedule, Mark
from lora_trainer.strict_model import NotBool, Section


def _tag(value: Any) -> str | None:
    """The member of the union: our own type, or `plugin` for any other name."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return None if kind is None else kind if kind in SCHEDULES else "plugin"


def _nested(value: Any) -> Any:
    """`{type, steps, scale, ...}` as written, with the schedule's own keys in a section of their own."""
    if not isinstance(value, dict) or "schedule" in value:
        return value
    own = {key: value[key] for key in ("steps", "scale") if key in value}
    return {**own, "schedule": {key: entry for key, entry in value.items() if key not in own}}


class Phase(Section):
    """One part of a composed schedule."""

    steps: Duration
    """Its length: updates, epochs ("2ep") or a share of the run. Required."""
    scale: Annotated[float, Field(gt=0), NotBool] = 1.0
    """Factor on the whole phase."""
    schedule: LRSchedulerOptions
    """The schedule that runs from 0 over this phase; written beside `steps`, as in {type: linear, steps: 100}."""


class Phases(ScheduleOptions):
    """m = scale x the multiplier of the phase that update k lies in, each phase counting from 0 over its own length."""

    type: Literal["phases"] = "phases"
    phases: Annotated[tuple[Annotated[Phase, BeforeValidator(_nested)], ...], Field(min_length=1)]
    """List of {type, steps, scale, options of that type}; the steps should sum to the run. Required."""
    example: ClassVar[dict[str, Any]] = {
        "phases": [
            {"type": "constant_with_warmup", "steps": "20%", "warmup_steps": "50%"},
            {"type": "constant", "steps": "40%"},
            {"type": "cosine", "steps": "40%", "scale": 0.5},
        ]
    }
    summary: ClassVar[str] = "any schedules, joined end to end"
    limits: ClassVar[str] = "lengths are yours to add up"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        laid = self._laid(horizon)

        def joined(k: int, base_lr: float) -> float:
            for start, scale, schedule in reversed(laid):
                if k >= start:
                    return scale * schedule.multiplier(k - start, base_lr)
            raise AssertionError("the first phase starts at 0")

        return joined

    def marks(self, horizon: Horizon, warmup: int) -> tuple[Mark, ...]:
        laid = self._laid(horizon)
        inner = [Mark(start + mark.update, mark.label) for start, _, schedule in laid for mark in schedule.marks]
        borders = [Mark(start, f"Phase {number}") for number, (start, _, _) in enumerate(laid, start=1) if start]
        return tuple(sorted([*inner, *borders], key=lambda mark: mark.update))

    def total(self, horizon: Horizon) -> int:
        """Updates of all phases together."""
        return sum(at_least_one(phase.steps, horizon, "steps") for phase in self.phases)

    def _laid(self, horizon: Horizon) -> list[tuple[int, float, LRSchedule]]:
        """Start, scale and schedule of each phase."""
        laid, start = [], 0
        for phase in self.phases:
            length = at_least_one(phase.steps, horizon, "steps")
            if isinstance(phase.schedule, Plateau):
                raise ScheduleError("a phase cannot wait for the validation loss: use plateau alone")
            schedule = phase.schedule.resolve(Horizon(length, horizon.updates_per_epoch))
            laid.append((start, phase.scale, schedule))
            start += length
        return laid


class Ramp(ScheduleOptions):
    """m = geometric from start_ratio to end_ratio."""

    type: Literal["ramp"] = "ramp"
    start_ratio: Annotated[float, Field(gt=0), NotBool]
    end_ratio: Annotated[float, Field(gt=0), NotBool]
    summary: ClassVar[str] = "r"
    limits: ClassVar[str] = "l"
    example: ClassVar[dict[str, Any]] = {"start_ratio": 1, "end_ratio": 2}

    def core(self, horizon: Horizon, warmup: int) -> Core:
        import math

        low, high = math.log(self.start_ratio), math.log(self.end_ratio)
        n = max(1, horizon.num_updates - 1)
        return lambda k, _: math.exp((1 - k / n) * low + k / n * high)


SCHEDULES: dict[str, type[ScheduleOptions]] = {
    "constant": Constant,
    "constant_with_warmup": ConstantWithWarmup,
    "linear": Linear,
    "cosine": Cosine,
    "cosine_with_restarts": CosineWithRestarts,
    "polynomial": Polynomial,
    "cosine_annealing": CosineAnnealing,
    "cosine_warm_restarts": CosineWarmRestarts,
    "exponential": Exponential,
    "step": Step,
    "multistep": MultiStep,
    "piecewise_constant": PiecewiseConstant,
    "inverse_sqrt": InverseSqrt,
    "warmup_stable_decay": WarmupStableDecay,
    "rex": Rex,
    "one_cycle": OneCycle,
    "cyclic": Cyclic,
    "plateau": Plateau,
    "phases": Phases,
    "torch": TorchSchedule,
    "ramp": Ramp,
}
CLASSIC = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

LRSchedulerOptions = Annotated[
    Annotated[Constant, Tag("constant")]
    | Annotated[ConstantWithWarmup, Tag("constant_with_warmup")]
    | Annotated[Linear, Tag("linear")]
    | Annotated[Cosine, Tag("cosine")]
    | Annotated[CosineWithRestarts, Tag("cosine_with_restarts")]
    | Annotated[Polynomial, Tag("polynomial")]
    | Annotated[CosineAnnealing, Tag("cosine_annealing")]
    | Annotated[CosineWarmRestarts, Tag("cosine_warm_restarts")]
    | Annotated[Exponential, Tag("exponential")]
    | Annotated[Step, Tag("step")]
    | Annotated[MultiStep, Tag("multistep")]
    | Annotated[PiecewiseConstant, Tag("piecewise_constant")]
    | Annotated[InverseSqrt, Tag("inverse_sqrt")]
    | Annotated[WarmupStableDecay, Tag("warmup_stable_decay")]
    | Annotated[Rex, Tag("rex")]
    | Annotated[OneCycle, Tag("one_cycle")]
    | Annotated[Cyclic, Tag("cyclic")]
    | Annotated[Plateau, Tag("plateau")]
    | Annotated[Phases, Tag("phases")]
    | Annotated[TorchSchedule, Tag("torch")]
    | Annotated[Ramp, Tag("ramp")]
    | Annotated[PluginSchedule, Tag("plugin")],
    Discriminator(_tag),
]
Phase.model_rebuild()
Phases.model_rebuild()
