"""The arithmetic of a run, on plain numbers: what will happen before anything does. Never imports torch.

Samples = images x repeats. The global batch G = processes x batch_size x accumulation. An update draws from one bucket,
so an epoch has sum over buckets of ceil(n_b / G) updates, however G is split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lora_trainer.config.schema import RunConfig
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.schedules.durations import Horizon, ScheduleError, to_updates
from lora_trainer.schedules.facts import facts_of
from lora_trainer.schedules.options import ScheduleOptions
from lora_trainer.schedules.schedule import LRSchedule

DENOISER_GROUP = "unet"
"""Name in the log of the weights that no other group has."""


@dataclass(frozen=True, slots=True)
class Periods:
    """Every how many updates something happens; None is never."""

    checkpoint: int | None
    sample: int | None
    export: int | None


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The learning rates of one group of weights, and what looks like a mistake about them."""

    name: str
    schedule: str
    warmup_updates: int
    lr_start: float
    lr_peak: float
    lr_end: float
    lr_budget: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do, in numbers."""

    num_images: int
    bucket_sizes: tuple[int, ...]
    """Samples (images x repeats) of each bucket."""
    num_processes: int
    batch_size: int
    accumulation: int
    updates_per_epoch: int
    num_updates: int
    lr_groups: tuple[GroupPlan, ...]
    num_modules: int
    num_parameters: int
    periods: Periods

    @property
    def num_samples(self) -> int:
        return sum(self.bucket_sizes)

    @property
    def global_batch(self) -> int:
        return self.num_processes * self.batch_size * self.accumulation

    @property
    def num_epochs(self) -> float:
        return self.num_updates / self.updates_per_epoch

    @property
    def horizon(self) -> Horizon:
        return Horizon(self.num_updates, self.updates_per_epoch)

    def as_json(self) -> dict[str, Any]:
        """All numbers, the derived ones too."""
        return asdict(self) | {
            "num_samples": self.num_samples,
            "global_batch": self.global_batch,
            "num_epochs": round(self.num_epochs, 4),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunPlan:
        """The inverse of `as_json`."""
        own = {field.name: content[field.name] for field in fields(cls)}
        own["bucket_sizes"] = tuple(own["bucket_sizes"])
        own["periods"] = Periods(**own["periods"])
        own["lr_groups"] = tuple(
            GroupPlan(**(group | {"warnings": tuple(group["warnings"])})) for group in own["lr_groups"]
        )
        return cls(**own)


def updates_per_epoch(bucket_sizes: Sequence[int], global_batch: int) -> int:
    """Optimizer updates in which every sample of every bucket is seen once."""
    return sum(math.ceil(size / global_batch) for size in bucket_sizes)


@dataclass(frozen=True, slots=True)
class LRGroup:
    """Weights that share a base LR and a schedule."""

    name: str
    base_lr: float
    options: ScheduleOptions
    schedule: LRSchedule

    def lr(self, k: int) -> float:
        """The learning rate of update k."""
        return self.schedule.lr(k, self.base_lr)


def lay_groups(config: RunConfig, horizon: Horizon) -> tuple[LRGroup, ...]:
    """The LR groups of a config over this run: the denoiser's first, then those of `optimizer.groups`.

    Raises:
        ConfigError: a schedule does not fit the run's length or its base LR; all such are named.
    """
    optimizer = config.optimizer
    wanted = [(DENOISER_GROUP, optimizer.lr, config.lr_scheduler, "lr_scheduler")]
    for index, group in enumerate(optimizer.groups):
        place = f"optimizer.groups[{index}].lr_scheduler"
        wanted.append((group.name, group.lr or optimizer.lr, group.lr_scheduler or config.lr_scheduler, place))
    laid, problems = [], []
    for name, base_lr, options, place in wanted:
        try:
            schedule = options.resolve(horizon)
            schedule.multiplier(horizon.num_updates - 1, base_lr)
            laid.append(LRGroup(name, base_lr, options, schedule))
        except ScheduleError as error:
            problems.append(Problem(f"`{place}`: {error}"))
    if problems:
        raise ConfigError(*problems)
    return tuple(laid)


def plan_run(
    config: RunConfig,
    *,
    num_images: int,
    bucket_sizes: Sequence[int],
    num_processes: int,
    target_shapes: Mapping[str, Sequence[int]],
) -> RunPlan:
    """Work out a run from its config and the counts that only the data, the launcher and the base know.

    Args:
        num_images: distinct image files.
        bucket_sizes: samples per bucket.
        num_processes: training processes.
        target_shapes: weight shape of each layer that gets an adapter, by its name.

    Raises:
        ConfigError: the LR schedule does not fit.
    """
    train = config.train
    global_batch = num_processes * train.batch_size * train.gradient_accumulation_steps
    per_epoch = updates_per_epoch(bucket_sizes, global_batch)
    num_updates = train.max_steps if train.max_steps is not None else (train.epochs or 0) * per_epoch
    horizon = Horizon(num_updates, per_epoch)
    return RunPlan(
        num_images=num_images,
        bucket_sizes=tuple(bucket_sizes),
        num_processes=num_processes,
        batch_size=train.batch_size,
        accumulation=train.gradient_accumulation_steps,
        updates_per_epoch=per_epoch,
        num_updates=num_updates,
        lr_groups=tuple(_group_plan(group) for group in lay_groups(config, horizon)),
        num_modules=len(target_shapes),
        num_parameters=sum(lora_parameters(shape, config.adapter.rank) for shape in target_shapes.values())
        + (sum(shape[0] for shape in target_shapes.values()) if config.adapter.use_dora else 0),
        periods=Periods(
            checkpoint=_period(config.checkpoint.every_steps, horizon),
            sample=_period(config.sample.every_steps, horizon),
            export=_period(config.export.every_steps, horizon),
        ),
    )


def _group_plan(group: LRGroup) -> GroupPlan:
    facts = facts_of(group.options, group.schedule, group.base_lr)
    return GroupPlan(
        name=group.name,
        schedule=group.options.type,
        warmup_updates=group.schedule.warmup.num_updates,
        lr_start=facts.first,
        lr_peak=facts.peak,
        lr_end=facts.last,
        lr_budget=facts.budget,
        warnings=facts.warnings,
    )


def lora_parameters(weight_shape: Sequence[int], rank: int) -> int:
    """Trainable numbers of one LoRA: A is [rank, in, *kernel], B is [out, rank]."""
    out_features, *rest = weight_shape
    return rank * math.prod(rest) + out_features * rank


def _period(duration: int | str | None, horizon: Horizon) -> int | None:
    return None if duration is None else to_updates(duration, horizon)
