"""The arithmetic of a run, on plain numbers: what will happen before anything does. Never imports torch.

Samples = images x repeats. The global batch G = processes x batch_size x accumulation. An update draws from one bucket,
so an epoch has sum over buckets of ceil(n_b / G) updates, however G is split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from lora_trainer.config.schema import LoraConfig, RunConfig, ValidationConfig
from lora_trainer.errors import ConfigError, Problem, SystemSetupError
from lora_trainer.schedules.schedule import Horizon, LRSchedule, ScheduleError, ScheduleOptions, facts_of, to_steps
from lora_trainer.storage.records import read_record, reason
from lora_trainer.strict_model import Count

TRAINING_FORWARDS = 2.2  # backward through a frozen UNet costs about 1.2 forwards (counted at SD 1.5's shape)
MAX_STEPS = 1_000_000
PROBE_STRATA = 16
MIN_PROBE_ITEMS = 2
MIN_MEASUREMENTS = 10
FILE_OVERHEAD = 2**20  # names, shapes and settings beside the tensors, bytes


@dataclass(frozen=True, slots=True)
class Periods:
    """Every how many updates something happens; None is never."""

    checkpoint: int | None
    sample: int | None
    export: int | None


@dataclass(frozen=True, slots=True)
class ParamGroupPlan:
    """The learning rates of one group of weights, and what looks like a mistake about them."""

    name: str
    schedule: str
    num_warmup_steps: Annotated[int, Field(alias="warmup_updates")]
    lr_start: float
    lr_peak: float
    lr_end: float
    lr_budget: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ValidationPlan:
    """How often and on how many images the probes are measured."""

    num_items: int
    """Images per probe."""
    every: int
    num_measurements: int
    cost: float
    """Forwards of the probes as a share of the training's forward-equivalents."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do, in numbers. An alias is the key in plan.json, which keeps its first name."""

    num_images: int
    bucket_sizes: tuple[int, ...]
    """Samples (images x repeats) of each bucket."""
    num_processes: int
    batch_size: int
    accumulation: int
    steps_per_epoch: Annotated[Count, Field(alias="updates_per_epoch")]
    num_steps: Annotated[Count, Field(alias="num_updates")]
    param_groups: Annotated[tuple[ParamGroupPlan, ...], Field(alias="lr_groups", min_length=1)]
    num_modules: int
    num_parameters: int
    periods: Periods
    validation: ValidationPlan | None = None
    num_lr_steps: Annotated[int | None, Field(alias="lr_updates")] = None
    """Length that the LR curves are param_groups over where a resume keeps an earlier one; None is `num_steps`."""

    @property
    def num_samples(self) -> int:
        return sum(self.bucket_sizes)

    @property
    def global_batch(self) -> int:
        return self.num_processes * self.batch_size * self.accumulation

    @property
    def num_epochs(self) -> float:
        return self.num_steps / self.steps_per_epoch

    @property
    def horizon(self) -> Horizon:
        return Horizon(self.num_steps, self.steps_per_epoch)

    @property
    def lr_horizon(self) -> Horizon:
        """What the LR curves are param_groups over."""
        return Horizon(self.num_lr_steps or self.num_steps, self.steps_per_epoch)

    def checkpoint_bytes(self, *, with_average: bool) -> int:
        """About what a checkpoint takes: adapter, two moments and the average in fp32; other optimizers keep 0 to 4."""
        return self.num_parameters * 4 * (4 if with_average else 3) + FILE_OVERHEAD

    def export_bytes(self, dtype: str) -> int:
        """About what the two final LoRA files and the last lines of the log take."""
        return 2 * (self.num_parameters * (4 if dtype == "fp32" else 2) + FILE_OVERHEAD)

    def as_json(self) -> dict[str, Any]:
        """All numbers, the derived ones too."""
        derived = {name: getattr(self, name) for name in ("num_samples", "global_batch")}
        derived["num_epochs"] = round(self.num_epochs, 4)
        return TypeAdapter(RunPlan).dump_python(self, by_alias=True) | derived

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunPlan:
        """The inverse of `as_json`."""
        return TypeAdapter(cls).validate_python(content)

    @classmethod
    def read(cls, file: Path) -> RunPlan:
        """The plan in a run's `plan.json`.

        Raises:
            SystemSetupError: it cannot be read, or is none.
        """
        try:
            return cls.from_json(read_record(file, cls))
        except (OSError, ValueError) as error:
            fix = "restore it; a run that is not at its end writes it anew where it goes on"
            raise SystemSetupError(Problem("the run's plan cannot be read", str(file), reason(error), fix)) from error


def steps_per_epoch(bucket_sizes: Sequence[int], global_batch: int) -> int:
    """Optimizer updates in which every sample of every bucket is seen once."""
    return sum(math.ceil(size / global_batch) for size in bucket_sizes)


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Weights that share a base LR and a schedule."""

    name: str
    base_lr: float
    options: ScheduleOptions
    schedule: LRSchedule

    def lr(self, k: int) -> float:
        """The learning rate of update k."""
        return self.schedule.lr(k, self.base_lr)


def resolve_param_groups(config: RunConfig, horizon: Horizon, denoiser: str) -> tuple[ParamGroup, ...]:
    """The LR groups of a config over this run: the denoiser's first, then those of `optimizer.groups`.

    Args:
        denoiser: the base's component whose weights are in the first group, which has its name.

    Raises:
        ConfigError: a schedule does not fit the run's length or its base LR; all such are named.
    """
    optimizer = config.optimizer
    wanted = [(denoiser, optimizer.lr, config.lr_scheduler, "lr_scheduler")]
    for index, group in enumerate(optimizer.groups):
        if group.name == denoiser:
            what = f"`optimizer.groups[{index}].name`: `{denoiser}` is the name of all other weights"
            raise ConfigError(Problem(what, fix="give the group another name"))
        place = f"optimizer.groups[{index}].lr_scheduler"
        wanted.append((group.name, group.lr or optimizer.lr, group.lr_scheduler or config.lr_scheduler, place))
    param_groups, problems = [], []
    for name, base_lr, options, place in wanted:
        try:
            schedule = options.resolve(horizon)
            schedule.multiplier(horizon.num_steps - 1, base_lr)
            param_groups.append(ParamGroup(name, base_lr, options, schedule))
        except (ScheduleError, OverflowError) as error:
            problems.append(Problem(f"`{place}`: {error}"))
    if problems:
        raise ConfigError(*problems)
    return tuple(param_groups)


def _steps_of(num_epochs: int, per_epoch: int) -> int:
    if num_epochs * per_epoch > MAX_STEPS:
        what = f"{num_epochs:,} epochs of {per_epoch:,} updates are more than {MAX_STEPS:,} updates"
        raise ConfigError(Problem(what, "train.epochs", fix="write fewer"))
    return num_epochs * per_epoch


def plan_run(
    config: RunConfig,
    *,
    denoiser: str,
    num_images: int,
    bucket_sizes: Sequence[int],
    num_processes: int,
    target_shapes: Mapping[str, Sequence[int]],
    num_held_out: int = 0,
    num_probes: int = 0,
    num_watched: int | None = None,
    num_lr_steps: int | None = None,
) -> RunPlan:
    """Work out a run from its config and the counts that only the data, the launcher and the base know.

    Args:
        denoiser: the base's component that gets the adapters.
        num_images: distinct image files.
        bucket_sizes: samples per bucket.
        num_processes: training processes.
        target_shapes: weight shape of each layer that gets an adapter, by its name.
        num_held_out: images that may be probed.
        num_probes: probes measured each time: held-out, training and, where there is one, prior images.
        num_watched: images of each probe where a resume keeps those of an earlier start.
        num_lr_steps: length of the LR curves where a resume keeps that of an earlier start.

    Raises:
        ConfigError: the LR schedule does not fit.
    """
    train = config.train
    global_batch = num_processes * train.batch_size * train.gradient_accumulation_steps
    per_epoch = steps_per_epoch(bucket_sizes, global_batch)
    num_steps = train.max_steps if train.max_steps is not None else _steps_of(train.epochs or 0, per_epoch)
    horizon = Horizon(num_steps, per_epoch)
    groups = resolve_param_groups(config, Horizon(num_lr_steps or num_steps, per_epoch), denoiser)
    return RunPlan(
        num_images=num_images,
        bucket_sizes=tuple(bucket_sizes),
        num_processes=num_processes,
        batch_size=train.batch_size,
        accumulation=train.gradient_accumulation_steps,
        steps_per_epoch=per_epoch,
        num_steps=num_steps,
        param_groups=tuple(_param_group_plan(group) for group in groups),
        num_modules=len(target_shapes),
        num_parameters=_num_parameters(config.adapter, target_shapes.values()),
        periods=_periods(config, horizon),
        validation=None
        if config.validation is None
        else plan_validation(
            config.validation,
            horizon,
            global_batch,
            num_held_out=num_held_out,
            num_probes=num_probes,
            num_watched=num_watched,
        ),
        num_lr_steps=None if num_lr_steps == num_steps else num_lr_steps,
    )


def plan_validation(
    config: ValidationConfig,
    horizon: Horizon,
    global_batch: int,
    *,
    num_held_out: int,
    num_probes: int,
    num_watched: int | None = None,
) -> ValidationPlan:
    """Fit the probes under their cost cap: first fewer images (two at least), then a longer period (ten probes).

    A forward costs 1, a training sample `TRAINING_FORWARDS` (forward, and backward through a frozen base).

    Args:
        num_watched: images of each probe in an earlier start of this run, which stay.
    """
    training = horizon.num_steps * global_batch * TRAINING_FORWARDS
    notes: list[str] = []

    def cost(items: int, every: int) -> float:
        return _measurements(horizon.num_steps, every) * items * num_probes * PROBE_STRATA / training

    items, every = num_watched or num_held_out, to_steps(config.every_steps, horizon)
    while num_watched is None and items > MIN_PROBE_ITEMS and cost(items, every) > config.max_cost:
        items -= 1
    if items < num_held_out:
        notes.append(
            f"{items} of {num_held_out} held-out images are probed, to keep the cost under {config.max_cost:.0%}"
        )
    longest = max(every, horizon.num_steps // MIN_MEASUREMENTS)
    asked = every
    while every < longest and cost(items, every) > config.max_cost:
        every += 1
    if every > asked:
        notes.append(f"probes every {every} updates in place of {asked}, to keep the cost under {config.max_cost:.0%}")
    if cost(items, every) > config.max_cost:
        notes.append(f"even so the probes cost {cost(items, every):.0%} of the training, over the cap")
    return ValidationPlan(items, every, _measurements(horizon.num_steps, every), cost(items, every), tuple(notes))


def _measurements(num_steps: int, every: int) -> int:
    """Probes after updates: one per period, and one after the last."""
    return num_steps // every + (num_steps % every > 0)


def _param_group_plan(group: ParamGroup) -> ParamGroupPlan:
    try:
        facts = facts_of(group.options, group.schedule, group.base_lr)
    except (ScheduleError, OverflowError) as error:
        raise ConfigError(Problem(f"the LR schedule of {group.name}: {error}", fix="write usual numbers")) from error
    return ParamGroupPlan(
        name=group.name,
        schedule=group.options.type,
        num_warmup_steps=group.schedule.warmup.num_steps,
        lr_start=facts.lrs[0],
        lr_peak=facts.peak,
        lr_end=facts.lrs[-1],
        lr_budget=facts.budget,
        warnings=facts.warnings,
    )


def lora_parameters(weight_shape: Sequence[int], rank: int) -> int:
    """Trainable numbers of one LoRA: A is [rank, in, *kernel], B is [out, rank]."""
    out_features, *rest = weight_shape
    return rank * math.prod(rest) + out_features * rank


def _num_parameters(adapter: LoraConfig, shapes: Iterable[Sequence[int]]) -> int:
    return sum(lora_parameters(s, adapter.rank) + (s[0] if adapter.use_dora else 0) for s in shapes)


def _periods(config: RunConfig, horizon: Horizon) -> Periods:
    asked = (config.checkpoint.every_steps, config.sample.every_steps, config.export.every_steps)
    return Periods(*(None if duration is None else to_steps(duration, horizon) for duration in asked))
