"""The section `sweep` of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from lora_trainer.schedules.schedule import check_period
from lora_trainer.strict_model import Count, NotBool, StrictModel, gathering

Seed = Annotated[int, Field(ge=0, lt=2**63), NotBool]


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("each seed once")
    return seeds


def _share(value: str) -> str:
    if not str(check_period(value)).endswith("%"):
        raise ValueError('a share of the run is expected, as "25%"')
    return value


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)]


class RandomConfig(StrictModel):
    """Arms drawn at random. A larger `num` keeps the earlier draws."""

    num: Count
    """Number of arms. Required."""
    seed: Seed = 0
    """Of the draws."""
    draws: Annotated[dict[str, dict[str, tuple[Any, ...]]], Field(min_length=1)]
    """Written beside `num`, by key path: {log_uniform: [low, high]}, {uniform: [low, high]} or {choice: [...]}."""


class ShortRunsConfig(StrictModel):
    """Complete short runs of all arms on the first seed, which choose the learning rates of each setting."""

    length: Annotated[str, AfterValidator(_share)] = "25%"
    """Of the updates; schedules are laid over it whole, so write their lengths as shares too."""
    keep: Count = 2
    """Learning rates of each setting that are then trained in full."""


def _without_behind(value: Any) -> Any:
    """The section without a key that is gone, where it only stands as the null of a config.yaml of ours."""
    is_unused = isinstance(value, dict) and "behind" in value and value["behind"] is None
    return {key: entry for key, entry in value.items() if key != "behind"} if is_unused else value


class PruneConfig(StrictModel):
    """Trials that end early or are not begun. Everything is off unless set; what was stopped and why is reported."""

    diverged: Annotated[float, Field(gt=1), NotBool] | None = None
    """Stop a trial whose held-out loss is this many times the frozen base's; null is off."""
    short_runs: ShortRunsConfig | None = None
    worse_after_seeds: Annotated[int, Field(ge=3), NotBool] | None = None
    """From this many finished seeds on, an arm that another is shown to be better than gets no further seeds."""


class ConfirmConfig(StrictModel):
    """What `lora-trainer sweep --confirm` trains after the sweep: its leaders, on seeds that took no part in it."""

    num_leaders: Annotated[int, Field(ge=2), NotBool] = 3
    """The best arms, each setting at its best LR."""
    seeds: Seeds | None = None
    """Fresh training seeds; default the five after the largest of the sweep."""


class SweepConfig(StrictModel):
    """Many trials on one frozen base: see docs/sweeps.md. Each arm is trained with each seed."""

    trials_per_pass: Literal["auto"] | Count = "auto"
    """Adapters that share a forward (LoRA and rsLoRA without dropout); `auto` as many as memory allows."""
    trials: dict[str, list[str] | dict[str, Any]] = {}
    """Arms by name: a list of `key.path=value`, or a mapping of key path and value."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Values by key path; every combination is an arm."""
    random: Annotated[RandomConfig | None, gathering("draws", "num", "seed")] = None
    seeds: Seeds | None = None
    """Training seeds, each with all arms; default the config's own `seed`."""
    confirm: ConfirmConfig = ConfirmConfig()
    prune: Annotated[PruneConfig, BeforeValidator(_without_behind)] = PruneConfig()
