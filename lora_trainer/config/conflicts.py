"""Settings that are each allowed but make no sense together. All of them are reported at once, each with its fix."""

from __future__ import annotations

from collections.abc import Iterator

from lora_trainer.config.optimizers import SGD, Prodigy, ScheduleFreeAdamW
from lora_trainer.config.schema import RunConfig
from lora_trainer.errors import Problem

Conflict = tuple[tuple[str, ...], Problem]
"""The key to point at, and what is wrong, but for its place in the file."""


def conflicts(config: RunConfig) -> Iterator[Conflict]:
    """What cannot stand together."""
    yield from _one_of_two(config)
    yield from _inert(config)
    yield from _optimizer_and_schedule(config)
    yield from _without_validation(config)


def _one_of_two(config: RunConfig) -> Iterator[Conflict]:
    """Pairs of settings of which exactly one is set."""
    train, data, validation = config.train, config.data, config.validation
    if train.max_steps is None and train.epochs is None:
        what = "exactly one of `train.max_steps` and `train.epochs` is set; here neither is"
        yield ("train", ""), Problem(what, fix="add train.max_steps: 1500 (updates) or train.epochs: 10")
    if train.max_steps is not None and train.epochs is not None:
        what = "exactly one of `train.max_steps` and `train.epochs` is set; here both are"
        fix = "write train.max_steps=null to keep train.epochs, or train.epochs=null"
        yield ("train", "epochs"), Problem(what, fix=fix)
    if (data.dir is None) == (data.sources is None):
        missing = "write data.dir: path/to/images or data.sources: [{dir: path/to/images, repeats: 2}]"
        fix = missing if data.dir is None else "remove data.sources, or write data.dir: null"
        yield ("data",), Problem("exactly one of `data.dir` and `data.sources` names the images", fix=fix)
    if validation is not None and (validation.dir is None) == (validation.fraction is None):
        what = "exactly one of `validation.dir` and `validation.fraction` says what is held out"
        fix = "write validation: {fraction: 0.1} or validation: {dir: path/to/held-out/images}"
        yield ("validation",), Problem(what, fix=fix)


def _inert(config: RunConfig) -> Iterator[Conflict]:
    """Settings that would have no effect, or none that anybody could use."""
    data, optimizer = config.data, config.optimizer
    if data.crops_per_image is not None and data.crop != "random":
        what = "`data.crops_per_image` has no effect with `crop: center`"
        yield ("data", "crops_per_image"), Problem(what, fix="remove it, or write crop: random")
    if isinstance(optimizer, SGD) and optimizer.nesterov and not optimizer.momentum:
        fix = "set optimizer.momentum: 0.9, or remove nesterov"
        yield ("optimizer", "nesterov"), Problem("`optimizer.nesterov` needs momentum", fix=fix)
    if config.adapter.use_rslora and config.adapter.use_dora:
        what = "`use_rslora` and `use_dora` together are in no consumer's format"
        yield ("adapter", "use_dora"), Problem(what, fix="write adapter.use_rslora: false or adapter.use_dora: false")
    if config.resume.schedule == "stretch" and not config.resume.allow_changes:
        what = "`resume.schedule: stretch` has no effect while no change of length is allowed"
        fix = "write resume.allow_changes: [train.max_steps] beside it, or remove it"
        yield ("resume", "schedule"), Problem(what, fix=fix)
    if config.sample.every_steps is not None and not config.sample.prompts:
        what = "`sample.every_steps` has no effect without `sample.prompts`"
        yield ("sample", "every_steps"), Problem(what, fix="add sample.prompts: [what to draw], or remove it")
    if config.model.revision is not None and "/" not in config.model.path:
        fix = "remove it, or write a Hub id such as org/name in model.path"
        yield ("model", "revision"), Problem("`model.revision` has no effect on a folder", fix=fix)


def _optimizer_and_schedule(config: RunConfig) -> Iterator[Conflict]:
    """Optimizers that follow no schedule, or one for all weights."""
    optimizer, groups = config.optimizer, config.optimizer.groups
    schedules = [config.lr_scheduler, *(group.lr_scheduler for group in groups if group.lr_scheduler is not None)]
    if isinstance(optimizer, ScheduleFreeAdamW) and any(schedule.type != "constant" for schedule in schedules):
        last = schedules[-1].type
        what = f"`schedule_free_adamw` averages instead of following a schedule; `{last}` would undo that"
        of_groups = " (of the groups, too)" if len(schedules) > 1 else ""
        fix = f"write lr_scheduler: {{type: constant}}{of_groups}; a warm-up is optimizer.warmup_steps"
        yield ("lr_scheduler",), Problem(what, fix=fix)
    if isinstance(optimizer, ScheduleFreeAdamW) and config.train.ema_decay is not None:
        what = "`schedule_free_adamw` keeps an average of its own"
        yield ("train", "ema_decay"), Problem(what, fix="remove train.ema_decay")
    several = any(schedule != config.lr_scheduler for schedule in schedules)
    if isinstance(optimizer, Prodigy) and (several or any(group.lr not in (None, optimizer.lr) for group in groups)):
        what = "`prodigy` estimates one step size for all weights, so groups cannot have learning rates of their own"
        fix = "remove the groups' lr and lr_scheduler, or choose another optimizer"
        yield ("optimizer", "groups"), Problem(what, fix=fix)


def _without_validation(config: RunConfig) -> Iterator[Conflict]:
    """What waits for held-out losses, where nothing is held out."""
    if config.validation is not None:
        return
    fix = "add validation: {fraction: 0.1}"
    schedules = [config.lr_scheduler, *(group.lr_scheduler for group in config.optimizer.groups)]
    if any(schedule is not None and schedule.type == "plateau" for schedule in schedules):
        what = "`plateau` waits for the validation loss, and there is no `validation` section"
        why = "the training loss is far too noisy to tell a plateau"
        yield ("lr_scheduler",), Problem(what, why=why, fix=fix)
    if config.sweep is not None:
        yield ("sweep",), Problem("a sweep compares held-out losses, and there is no `validation` section", fix=fix)
