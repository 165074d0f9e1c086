"""Everything that can be known and checked before the first tensor: base, data, targets, plan. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_trainer.config.identity import compare, identity_fields, refusal
from lora_trainer.config.places import CHECKPOINTS, PLAN_FILE, VALIDATION_FILE, cache_folder, lora_file, run_directory
from lora_trainer.config.schema import CURVE_LENGTH, FACTS, DataConfig, RunConfig
from lora_trainer.data.entries import entries_of
from lora_trainer.data.holdout import Split, split_by_folder, split_by_fraction, with_watched
from lora_trainer.data.records import Dataset, Progress, content_digest, discover, order_digest
from lora_trainer.errors import ConfigError, DataError, Problem, SystemSetupError, told_once
from lora_trainer.models.adapters.targets import assign_param_groups, select_targets
from lora_trainer.models.family import Family, joined_layers
from lora_trainer.models.folder import BaseFolder
from lora_trainer.models.registry import open_base, open_family
from lora_trainer.planning import preflight
from lora_trainer.planning.run_plan import ParamGroup, RunPlan, plan_run, resolve_param_groups
from lora_trainer.runtime.device import Device, Precision, find_devices, precision_on
from lora_trainer.runtime.launch import Launch, default_threads
from lora_trainer.storage.atomic_files import read_json
from lora_trainer.storage.records import Text, Update, read_record, shape


@dataclass(frozen=True)
class Prepared:
    """A run that is checked and planned: plain data."""

    config: RunConfig
    base: BaseFolder
    base_digests: dict[str, str]
    prediction_type: str
    split: Split
    target_shapes: dict[str, tuple[int, ...]]
    plan: RunPlan
    threads: int
    devices: tuple[Device, ...]
    """What it would compute on, then a GPU that it could not use."""
    precision: Precision
    num_entries: tuple[int, int]
    """Latents and prompts in the cache."""

    @property
    def run_dir(self) -> Path:
        return run_directory(self.config)

    @property
    def dataset(self) -> Dataset:
        """What is trained on."""
        return self.split.training

    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The groups of weights with their LR schedules laid over the run."""
        return resolve_param_groups(self.config, self.plan.lr_horizon, self.base.denoiser)

    def identity(self) -> dict[str, Any]:
        """All that decides what is learned: settings, content of data and base, and how the sums are split."""
        return identity_fields(self.config) | {
            "base content": "-".join(digest[:12] for digest in self.base_digests.values()),
            "data content": content_digest(self.dataset.records)[:16],
            "data order": order_digest(self.dataset.records)[:16],
            "validation content": content_digest(self.split.held_out)[:16],
            "model.prediction_type": self.prediction_type,
            "global batch": self.plan.global_batch,
            "num_processes": self.plan.num_processes,
            "train.threads": self.threads,
            CURVE_LENGTH: self.plan.lr_horizon.num_steps,
        }


def prepare(config: RunConfig, launch: Launch, progress: Progress, *, continues: bool | None = None) -> Prepared:
    """Check the base's folder, every image and caption, and work out the plan.

    Args:
        continues: whether an earlier start is continued; None where the checkpoints in the run's directory tell.

    Raises:
        ConfigError, DataError, ModelError, SystemSetupError: each with all problems of its kind.
    """
    preflight.check_places(config)
    preflight.check_packages(config)
    preflight.check_prompts(preflight.prompts_of(config))
    devices = find_devices()
    precision = precision_on(config.train.precision, devices[0])
    base = open_base(**config.model.model_dump())
    family = open_family(base)
    predicts = preflight.prediction_type(config, base, family)
    preflight.check_resolution(config, family)
    preflight.check_inference_steps(config, base, predicts)
    fixed = _fixed_before(config, continues)
    split, prior = _split(config, checked_images_file(config), progress, fixed.held_out)
    shown = [*split.training.records, *split.held_out, *(prior.records if prior else ())]
    cut = preflight.cut_texts(config, family, [(record.path, record.name, record.captions) for record in shown])
    split = replace(split, training=replace(split.training, notes=(*split.training.notes, *cut)))
    targets = _targets(config, base, family)
    num_probes = 2 + (prior is not None)
    plan = _plan(config, base, split, targets, launch.num_processes, num_probes=num_probes, fixed=fixed)
    if plan.validation is not None and config.validation is not None:
        split = with_watched(split, prior, plan.validation.num_items, config.validation.seed)
    digests = base.digests(cache_folder(config) / "base-digests.json", progress)
    entries = entries_of(config, family, split.training.records, split.probes, digests)
    preflight.check_room(config, plan, entries.missing_bytes(family, config.data.resolution))
    threads = _threads(config, fixed, default_threads(launch))
    num_entries = len(entries.images), len(entries.texts)
    return Prepared(config, base, digests, predicts, split, targets, plan, threads, devices, precision, num_entries)


def checked_images_file(config: RunConfig) -> Path:
    """What remembers the images that were decoded before."""
    return cache_folder(config) / "checked-images.json"


def prepare_like(prepared: Prepared, config: RunConfig, *, continues: bool | None = None) -> Prepared:
    """Another run on the same base, data and probe, without reading them again.

    Args:
        continues: as in `prepare`.

    Raises:
        ConfigError: targets, groups or schedules do not fit.
    """
    preflight.check_packages(config)
    base, split = prepared.base, prepared.split
    targets = _targets(config, base, open_family(base))
    fixed = _fixed_before(config, continues)
    num_processes, num_probes = prepared.plan.num_processes, len(split.probes)
    plan = _plan(config, base, split, targets, num_processes, num_probes=num_probes, fixed=fixed)
    threads = _threads(config, fixed, prepared.threads)
    return replace(prepared, config=config, target_shapes=targets, plan=plan, threads=threads)


def _threads(config: RunConfig, fixed: _Fixed, default: int) -> int:
    """As the config says; `auto` is what an earlier start of the run had, so that another machine gives its bytes."""
    return (fixed.threads or default) if config.train.threads == "auto" else config.train.threads


def _targets(config: RunConfig, base: BaseFolder, family: Family) -> dict[str, tuple[int, ...]]:
    """The layers to adapt; the groups of weights and the names in LoRA files are checked against them."""
    chosen = select_targets(base.denoiser_shapes(), config.adapter.targets, family.target_presets)
    targets = {layer: tuple(shape) for layer, shape in chosen.items()}
    layers = [f"{base.denoiser}.{layer}" for layer in targets]
    joined_layers(family.kohya_names(layers))
    weights = [f"{layer}.lora_{kind}.weight" for layer in layers for kind in "AB"]
    assign_param_groups(weights, {group.name: group.match for group in config.optimizer.groups}, base.denoiser)
    return targets


def _plan(
    config: RunConfig,
    base: BaseFolder,
    split: Split,
    targets: Mapping[str, Any],
    num_processes: int,
    *,
    num_probes: int,
    fixed: _Fixed,
) -> RunPlan:
    return plan_run(
        config,
        denoiser=base.denoiser,
        num_images=len(split.training.records),
        bucket_sizes=[split.training.num_samples],
        num_processes=num_processes,
        target_shapes=targets,
        num_held_out=len(split.held_out),
        num_probes=num_probes,
        num_watched=fixed.num_watched,
        num_lr_steps=fixed.num_lr_steps,
    )


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What an earlier start of a run fixed for those that continue it, whatever their length; None is free."""

    num_lr_steps: int | None = None
    """Length that its LR curves are laid over."""
    num_watched: int | None = None
    """Images of each probe."""
    threads: int | None = None
    held_out: Sequence[str] | None = None
    """Content hashes of the images that it held out."""


_PROBES, _IDENTITY = shape({"num_items": Update}) | None, shape({}, {"train.threads": Update})
_LENGTHS = {"num_updates": Update, "lr_updates": Update | None}
_BEFORE = shape({}, {**_LENGTHS, "validation": _PROBES, "identity": _IDENTITY})
"""What is looked at of an earlier start's plan."""
_CHOSEN = shape({"images_held_out": list[Text]})


def _fixed_before(config: RunConfig, continues: bool | None) -> _Fixed:
    run_dir = run_directory(config)
    if continues is None:
        continues = any((run_dir / CHECKPOINTS).glob("step-*"))
    if not continues:
        return _Fixed()
    before, chosen = _earlier(run_dir / PLAN_FILE, _BEFORE), _earlier(run_dir / VALIDATION_FILE, _CHOSEN)
    length = None if config.resume.schedule == "stretch" else before.get("lr_updates") or before.get("num_updates")
    num_watched = (before.get("validation") or {}).get("num_items")
    threads = before.get("identity", {}).get("train.threads")
    return _Fixed(length, num_watched, threads, chosen.get("images_held_out"))


def _earlier(file: Path, wanted: Any) -> dict[str, Any]:
    """A record of an earlier start; empty where none can be read."""
    try:
        return dict(read_record(file, wanted))
    except (OSError, ValueError):
        return {}


def check_resume(prepared: Prepared) -> None:
    """What a start would refuse to continue, as far as the newest checkpoint's settings can be read.

    Raises:
        ConfigError: the run began with others, or its LR curve is over.
        SystemSetupError: its checkpoints are gone.
    """
    run_dir, config = prepared.run_dir, prepared.config
    if not any((run_dir / CHECKPOINTS).glob("step-*")):
        check_not_lost(config)
    try:
        newest = max((run_dir / CHECKPOINTS).glob("step-????????"))
        state = read_json(newest / "state.json")
        (stored,) = (trial["identity"] for trial in state["trials"].values())
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, damaged, or of the earlier format: the start itself tells
    now = {key: stored[key] for key in FACTS if key in stored} | prepared.identity()
    now |= {"train.precision": prepared.precision}
    if refused := compare(stored, now, config.resume, str(run_dir)).refused:
        raise ConfigError(*told_once([(f"`{config.name}`", refusal(stored, now, refused, str(run_dir)))], " "))
    check_kept_curve(prepared)


def check_not_lost(config: RunConfig) -> None:
    """Refuse to begin a run anew where its LoRA is.

    Raises:
        SystemSetupError: it lies there, without a checkpoint.
    """
    if lora_file(config).exists():
        what = "this run has its LoRA but no checkpoint, so nothing could be continued"
        why = "its checkpoints were removed, or the disk never took one"
        fix = "start anew with --fresh (the old run is kept beside it), or give the new run another `name`"
        raise SystemSetupError(Problem(what, str(run_directory(config)), why, fix))


def check_kept_curve(prepared: Prepared) -> None:
    """Refuse to go on along a curve that ended at 0.

    Raises:
        ConfigError: the updates after its end would do nothing.
    """
    length = prepared.plan.lr_horizon.num_steps
    num_more = prepared.plan.num_steps - length
    if num_more > 0 and all(group.lr(length) == 0 for group in prepared.param_groups()):
        what = f"the LR curve of this run ends at 0 after {length} updates: {num_more} more would learn nothing"
        where, why = f"{prepared.config.name}, resume.schedule", "`keep` holds the curve's last value"
        fix = "write resume.schedule: stretch, which lays the curve over the new length"
        raise ConfigError(Problem(what, where, why, fix))


def image_folders(config: RunConfig) -> dict[str, DataConfig]:
    """How the images of each setting are found: those to train on under `data`, and those of the probes."""
    chosen, layout = config.validation, config.data.layout
    others = {f"validation.{key}": getattr(chosen, key, None) for key in ("dir", "prior_dir")}
    own = {"sources": None, "layout": "auto" if layout == "kohya" else layout}
    given = {key: config.data.model_copy(update=own | {"dir": folder}) for key, folder in others.items() if folder}
    return {"data": config.data} | given


def _split(
    config: RunConfig, checked: Path, progress: Progress, chosen_before: Sequence[str] | None
) -> tuple[Split, Dataset | None]:
    """The training images without those held out, and the prior images where there are some."""
    found: dict[str, Dataset] = {}
    problems: list[Problem] = []
    for key, data in image_folders(config).items():
        try:
            found[key] = discover(data, checked, progress)
        except DataError as error:
            problems += [
                replace(p, fix=p.fix and p.fix.replace("data.dir", _dir_of(key, data))) for p in error.problems
            ]
    if problems:
        raise DataError(*problems)
    dataset, validation = found.pop("data"), config.validation
    notes = [f"{key}: {note}" for key, other in found.items() for note in other.notes]
    dataset = replace(dataset, notes=(*dataset.notes, *notes))
    if validation is None:
        return Split(dataset), None
    if validation.fraction is not None:
        split = split_by_fraction(dataset, validation.fraction, validation.seed, chosen_before)
    else:
        split = split_by_folder(dataset, found["validation.dir"])
    return split, found.get("validation.prior_dir")


def _dir_of(key: str, data: DataConfig) -> str:
    """The setting that names a folder of images."""
    return key if key != "data" else "data.dir" if data.dir is not None else "data.sources"
