"""The learning-rate finder's run, checked and planned before the first tensor. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_trainer.config.optimizers import Prodigy
from lora_trainer.config.places import cache_folder
from lora_trainer.config.schema import RunConfig
from lora_trainer.data.holdout import with_watched
from lora_trainer.data.records import Progress
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.experiments.lr_finder.analysis import FACTORS, MIN_POINTS
from lora_trainer.planning.prepare import Prepared, prepare, prepare_like
from lora_trainer.planning.run_plan import PROBE_STRATA, TRAINING_FORWARDS
from lora_trainer.runtime.launch import Launch
from lora_trainer.schedules.curves import Constant
from lora_trainer.schedules.cycles import Ramp
from lora_trainer.tracking.metrics import HELD_OUT
from lora_trainer.training.group import TrialGroup, solo_group

BELOW_USUAL, ABOVE_USUAL = 100, 10_000
HIGHEST_LR = 1.0


@dataclass(frozen=True, slots=True)
class FinderOptions:
    """What the command line says; None is the default that belongs to the optimizer."""

    num_steps: int = 100
    start_lr: float | None = None
    end_lr: float | None = None
    num_images: int = 4
    """Held-out images that are probed, each at 16 timesteps."""
    verify: bool = False
    num_verify_steps: int = 50


@dataclass(frozen=True, slots=True)
class PreparedFinder:
    """A finder's run that is checked and planned."""

    config: RunConfig
    """Of the training that the answer is for."""
    prepared: Prepared
    """Of the same training under a ramp and another name, so that it writes beside the run and not into it."""
    start_lr: float
    end_lr: float
    options: FinderOptions
    fallback_lr: float

    @property
    def folder(self) -> Path:
        return self.prepared.run_dir

    def lr(self, k: int) -> float:
        """The learning rate of the ramp's update k."""
        return self.prepared.param_groups()[0].lr(k)

    def ramp_group(self) -> TrialGroup:
        """The ramp as a group of one."""
        return replace(solo_group(self.prepared), max_skips=1, log_only=True)

    def verification_group(self, lrs: Sequence[float]) -> TrialGroup:
        """A short run at each of these learning rates, all on the same batches."""
        members = tuple(member for lr in lrs for member in solo_group(self._short_run(lr)).members)
        return TrialGroup("verify", self.folder / "verify", members, "auto", max_skips=1, log_only=True)

    def _short_run(self, lr: float) -> Prepared:
        config, length = self.prepared.config, self.options.num_verify_steps
        ratio = lr / config.optimizer.lr
        groups = tuple(
            group if group.lr is None else group.model_copy(update={"lr": group.lr * ratio})
            for group in config.optimizer.groups
        )
        changes = {
            "name": f"lr{lr:.1e}",
            "output_dir": str(self.folder / "verify"),
            "data": config.data.model_copy(update={"cache_dir": str(cache_folder(config))}),
            "optimizer": config.optimizer.model_copy(update={"lr": lr, "groups": groups}),
            "lr_scheduler": Constant(),
            "train": config.train.model_copy(update={"max_steps": length}),
        }
        prepared = prepare_like(self.prepared, config.model_copy(update=changes), continues=False)
        return _validated_every(prepared, length)


def prepare_finder(config: RunConfig, launch: Launch, options: FinderOptions, progress: Progress) -> PreparedFinder:
    """Check the config, the data, the base and the ramp.

    Raises:
        ConfigError: there is no validation section, the optimizer finds its own LR, or the ramp is no ramp.
        DataError, ModelError, SystemSetupError: as `prepare`.
    """
    default = type(config.optimizer).model_fields["lr"]
    usual = config.optimizer.lr if default.is_required() else float(default.default)
    start = options.start_lr if options.start_lr is not None else usual / BELOW_USUAL
    end = options.end_lr if options.end_lr is not None else min(HIGHEST_LR, usual * ABOVE_USUAL)
    if problems := list(_problems(config, start, end, options)):
        raise ConfigError(*problems)
    ramp = Ramp(start_ratio=start / config.optimizer.lr, end_ratio=end / config.optimizer.lr)
    prepared = prepare(_finder_config(config, ramp, options), launch, progress)
    assert config.validation is not None
    watched = with_watched(prepared.split, None, options.num_images, config.validation.seed).probes[HELD_OUT]
    prepared = replace(prepared, split=replace(prepared.split, probes={HELD_OUT: watched}))
    return PreparedFinder(config, _validated_every(prepared, 1), start, end, options, usual)


def _validated_every(prepared: Prepared, every: int) -> Prepared:
    """The same run with its probes measured after every so many updates, whatever they cost."""
    plan = prepared.plan
    assert plan.validation is not None
    return replace(prepared, plan=replace(plan, validation=replace(plan.validation, every=every)))


def _finder_config(config: RunConfig, ramp: Ramp, options: FinderOptions) -> RunConfig:
    """The same training but for what would hide the LR's effect or cost time: schedule, average, samples, saves."""
    groups = tuple(group.model_copy(update={"lr_scheduler": None}) for group in config.optimizer.groups)
    train = {"max_steps": options.num_steps, "epochs": None, "ema_decay": None}
    return config.model_copy(
        update={
            "name": f"{config.name}-find-lr",
            "optimizer": config.optimizer.model_copy(update={"groups": groups}),
            "lr_scheduler": ramp,
            "train": config.train.model_copy(update=train),
            "validation": config.validation and config.validation.model_copy(update={"keep_best": False}),
            "sample": type(config.sample)(),
            "checkpoint": type(config.checkpoint)(every_steps=None),
            "export": type(config.export)(),
            "tracking": type(config.tracking)(tensorboard=False, base_loss_every=None),
        }
    )


def finder_rows(finder: PreparedFinder) -> Iterator[tuple[str, str]]:
    """The plan in words, row by row."""
    prepared, options = finder.prepared, finder.options
    plan, num_images = prepared.plan, len(prepared.split.probes[HELD_OUT])
    yield "images", f"{plan.num_images} to train on, {len(prepared.split.held_out)} held out; batch {plan.global_batch}"
    ratio = (finder.end_lr / finder.start_lr) ** (1 / (options.num_steps - 1))
    lrs = f"from {finder.start_lr:.1e} to {finder.end_lr:.1e}, x {ratio:.3f} each"
    yield "ramp", f"{options.num_steps} updates {lrs}"
    short = num_images < options.num_images
    missing = f", of {options.num_images} asked for, as no more are held out" if short else ""
    yield "probe", f"{num_images} images{missing}, x {PROBE_STRATA} timesteps after every update"
    updates, measurements = options.num_steps, options.num_steps + 1
    if options.verify:
        updates += len(FACTORS) * options.num_verify_steps
        measurements += len(FACTORS)
        runs = f"{len(FACTORS)} learning rates x {options.num_verify_steps} updates"
        yield "verify", f"{runs}, packed, from the same start"
    training = round(updates * plan.global_batch * TRAINING_FORWARDS)
    probes = measurements * num_images * PROBE_STRATA
    yield "cost", f"about {training + probes:,} forwards at most: {training:,} for training, {probes:,} for probes"
    yield "", "the ramp stops by itself where the loss diverges"
    yield "base", f"{prepared.base.family}, {prepared.prediction_type}, {prepared.config.model.path}"
    yield "output", f"{finder.folder}/find_lr.json and find_lr.png; the run's own folder is not touched"


def _problems(config: RunConfig, start: float, end: float, options: FinderOptions) -> Iterator[Problem]:
    if config.validation is None:
        yield Problem(
            "find-lr measures held-out images, and there is no `validation` section",
            why="the training loss is far too noisy: finders that read it stop and suggest at random",
            fix="add validation: {fraction: 0.1} to the file, or 'validation={fraction: 0.1}' to the command",
        )
    if isinstance(config.optimizer, Prodigy):
        yield Problem(
            "`prodigy` estimates its own step size, so there is no learning rate to find",
            "optimizer.type",
            fix="keep optimizer.lr: 1.0, or choose another optimizer",
        )
    if options.num_steps < MIN_POINTS:
        yield Problem(f"a ramp of {options.num_steps} updates is too coarse", "--steps", fix=f"{MIN_POINTS} or more")
    if not 0 < start < end <= HIGHEST_LR:
        yield Problem(
            f"a ramp from {start:g} to {end:g} does not rise within (0, {HIGHEST_LR:g}]",
            "--start-lr, --end-lr",
            fix="leave them away: the ramp then runs from a hundredth of the optimizer's default up to 1",
        )
