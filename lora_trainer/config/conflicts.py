"""Settings that are each allowed but make no sense together. All of them are reported at once, each with its fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_trainer.config.optimizers import SGD, Prodigy, ScheduleFreeAdamW
from lora_trainer.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two settings that exclude each other; `key` is the one to point at."""

    key: tuple[str, ...]
    what: str
    fix: str
    why: str | None = None


def conflicts(config: RunConfig, written: dict[str, Any]) -> Iterator[Conflict]:
    """What cannot stand together; `written` is what the user wrote, before defaults."""
    yield from _run_length(config)
    yield from _data(config, written)
    yield from _inert(config, written)
    yield from _pairs(config)
    yield from _validation(config)
    yield from _sweep(config)


def _pairs(config: RunConfig) -> Iterator[Conflict]:
    """Optimizers and schedules that make no sense together."""
    optimizer, schedules = config.optimizer, [config.lr_scheduler]
    schedules += [group.lr_scheduler for group in optimizer.groups if group.lr_scheduler is not None]
    if isinstance(optimizer, ScheduleFreeAdamW) and any(schedule.type != "constant" for schedule in schedules):
        yield Conflict(
            ("lr_scheduler",),
            f"`schedule_free_adamw` averages instead of following a schedule; `{schedules[-1].type}` would undo that",
            "write lr_scheduler: {type: constant}; a warm-up is optimizer.warmup_steps",
        )
    if isinstance(optimizer, ScheduleFreeAdamW) and config.train.ema_decay is not None:
        yield Conflict(
            ("train", "ema_decay"),
            "`schedule_free_adamw` keeps an average of its own",
            "remove train.ema_decay",
        )
    own_lr = any(group.lr not in (None, optimizer.lr) for group in optimizer.groups)
    own_schedule = any(group.lr_scheduler not in (None, config.lr_scheduler) for group in optimizer.groups)
    if isinstance(optimizer, Prodigy) and (own_lr or own_schedule):
        yield Conflict(
            ("optimizer", "groups"),
            "`prodigy` estimates one step size for all weights, so groups cannot have learning rates of their own",
            "remove the groups' lr and lr_scheduler, or choose another optimizer",
        )


def _run_length(config: RunConfig) -> Iterator[Conflict]:
    train = config.train
    if (train.max_steps is None) == (train.epochs is None):
        both = train.max_steps is not None
        yield Conflict(
            ("train", "epochs" if both else ""),
            f"exactly one of `train.max_steps` and `train.epochs` is set; here {'both are' if both else 'neither is'}",
            "keep one of them; on the command line: train.epochs=10 train.max_steps=null"
            if both
            else "add train.max_steps: 1500 (updates) or train.epochs: 10",
        )


def _data(config: RunConfig, written: dict[str, Any]) -> Iterator[Conflict]:
    data = config.data
    if (data.dir is None) == (data.sources is None):
        yield Conflict(
            ("data",),
            "exactly one of `data.dir` and `data.sources` names the images",
            "add data.dir: path/to/images, or a list data.sources: [{dir: ..., repeats: ...}]",
        )
    if data.crops_per_image is not None and data.crop != "random":
        yield Conflict(
            ("data", "crops_per_image"),
            "`data.crops_per_image` has no effect with `crop: center`",
            "remove it, or write crop: random",
        )


def _validation(config: RunConfig) -> Iterator[Conflict]:
    validation = config.validation
    if validation is not None and (validation.dir is None) == (validation.fraction is None):
        yield Conflict(
            ("validation",),
            "exactly one of `validation.dir` and `validation.fraction` says what is held out",
            "write validation: {fraction: 0.1}, or dir: path/to/held-out/images",
        )
    schedules = {"lr_scheduler": config.lr_scheduler.type}
    schedules |= {f"group {g.name}": g.lr_scheduler.type for g in config.optimizer.groups if g.lr_scheduler}
    if validation is None and "plateau" in schedules.values():
        yield Conflict(
            ("lr_scheduler",),
            "`plateau` waits for the validation loss, and there is no `validation` section",
            "add validation: {fraction: 0.1}",
            "the training loss is far too noisy to tell a plateau",
        )


def _sweep(config: RunConfig) -> Iterator[Conflict]:
    if config.sweep is None:
        return
    if config.validation is None:
        yield Conflict(
            ("sweep",),
            "a sweep compares held-out losses, and there is no `validation` section",
            "add validation: {fraction: 0.1}",
        )


def _inert(config: RunConfig, written: dict[str, Any]) -> Iterator[Conflict]:
    if isinstance(config.optimizer, SGD) and config.optimizer.nesterov and not config.optimizer.momentum:
        yield Conflict(
            ("optimizer", "nesterov"),
            "`optimizer.nesterov` needs momentum",
            "set optimizer.momentum: 0.9, or remove nesterov",
        )
    if config.adapter.use_rslora and config.adapter.use_dora:
        yield Conflict(
            ("adapter", "use_dora"),
            "`use_rslora` and `use_dora` together are in no consumer's format",
            "keep one of them",
        )
    if config.resume.schedule == "stretch" and not config.resume.allow_changes:
        yield Conflict(
            ("resume", "schedule"),
            "`resume.schedule: stretch` has no effect while no change of length is allowed",
            "write resume.allow_changes: [train.max_steps] beside it, or remove it",
        )
    if config.sample.every_steps is not None and not config.sample.prompts:
        yield Conflict(
            ("sample", "every_steps"),
            "`sample.every_steps` has no effect without `sample.prompts`",
            "add prompts, or remove it",
        )
    if config.model.revision is not None and "/" not in config.model.path:
        yield Conflict(
            ("model", "revision"),
            "`model.revision` has no effect on a folder",
            "remove it, or write a Hub id such as org/name in model.path",
        )
