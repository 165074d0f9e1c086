"""What is known of a run before it starts: `lora-trainer check` and `plan`; `presets`, to start from. Never torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lora_trainer.cli.session import check_platform
from lora_trainer.cli.show import show_views
from lora_trainer.config.learning_rates import PRESETS
from lora_trainer.config.load import load_config
from lora_trainer.config.optimizers import optimizer_row
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.source import Source, set_value
from lora_trainer.config.trials import TrialConfig, load_sweep
from lora_trainer.data.captions import long_captions, quoted
from lora_trainer.data.records import survey
from lora_trainer.errors import ConfigError, DataError, Problem
from lora_trainer.experiments.sweep.derived import plan_short_runs
from lora_trainer.experiments.sweep.prepare import PreparedSweep, prepare_sweep, sweep_rows
from lora_trainer.models.registry import open_base, open_family
from lora_trainer.planning.memory import memory_rows
from lora_trainer.planning.prepare import Prepared, check_resume, checked_images_file, image_folders, prepare
from lora_trainer.planning.rows import notes, plan_rows
from lora_trainer.runtime.launch import Launch, read_launch
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.group import TrialGroup, solo_group

CAPTIONS_SHOWN = 3


def prepare_plan(config: RunConfig, num_processes: int | None = None) -> Prepared:
    """Check base and data and work out the plan, as for this many processes."""
    return prepare(config, _launch(config, num_processes), MainConsole().track)


def _launch(config: RunConfig, num_processes: int | None = None) -> Launch:
    launch = read_launch(config)
    if num_processes is None:
        return launch
    return replace(launch, num_processes=num_processes, num_local_processes=num_processes)


def check(config_file: Path, overrides: Sequence[str], *, config_only: bool = False, show: int = 0) -> None:
    """Say that the configuration, and unless `config_only` the base and every image and caption, can be used.

    Args:
        show: so many crops are written, with their captions, as they are trained on.

    Raises:
        TrainerError: they cannot; with all problems of the first kind that has any, as `train` would.
    """
    check_platform()
    config = load_config(config_file, overrides)
    sweeps = _sweeps(config_file, overrides) if config.sweep is not None else []
    console = MainConsole()
    console.print(f"configuration  {config_file} can be used")
    if config_only:
        return
    if not sweeps:
        prepared = prepare_plan(config)
        check_resume(prepared)
        runs = [prepared]
    for sweep in sweeps:
        runs = _runs_of(prepare_sweep(*sweep, _launch(config), console.track))
        console.print(f"trials         {len(runs)} to train")
    for name, finding in _findings(runs):
        console.print(f"{name:<15}{finding}")
    if show:
        console.print(f"shown in       {show_views(runs[0], show)}")


def _runs_of(sweep: PreparedSweep) -> list[Prepared]:
    return [member.prepared for group in sweep.groups for member in group.members]


def _sweeps(config_file: Path, overrides: Sequence[str]) -> list[tuple[RunConfig, list[TrialConfig]]]:
    """What `train` would start one after the other: the short runs that choose the rates, and the sweep itself."""
    config, trials = load_sweep(config_file, overrides)
    short = plan_short_runs(config, trials)
    first = [] if short is None else [load_sweep(config_file, [*overrides, *short.overrides])]
    return [*first, (config, trials)]


def check_files(config_file: Path, overrides: Sequence[str]) -> None:
    """Print as JSON what becomes of every file in the image folders: used, a caption, skipped or refused.

    Raises:
        TrainerError: the configuration cannot be read, or a file is refused.
    """
    config = load_config(config_file, overrides)
    content: dict[str, Any] = {"used": {}, "captions": {}, "skipped": {}, "refused": []}
    for data in image_folders(config).values():
        dataset, problems = survey(data, checked_images_file(config), lambda items, *_: items)
        if data.captions.too_long == "error" and dataset.records:
            family = open_family(open_base(**config.model.model_dump()))
            problems += long_captions(family, [(r.path, r.name, r.captions) for r in dataset.records])[0]
        refused = {problem.where for problem in problems}
        used = {str(record.path) for record in dataset.records}
        skipped = {str(file): reason for file, reason in dataset.skipped}
        others = {str(file) for file in dataset.pictures} - used - skipped.keys() - refused
        problems += [Problem("refused for its caption", file) for file in sorted(others)]
        content["used"] |= dict.fromkeys(sorted(used - refused))
        content["captions"] |= dict.fromkeys(str(file) for file in dataset.caption_files if str(file) not in refused)
        content["skipped"] |= skipped
        content["refused"] += [asdict(problem) for problem in problems]
    content |= {kind: list(content[kind]) for kind in ("used", "captions")}
    MainConsole().print(json.dumps(content, indent=2))
    if content["refused"]:
        num = len({problem["where"] for problem in content["refused"]})
        raise DataError(f"{num} files are refused; the list says why")
    sweeps = _sweeps(config_file, overrides) if config.sweep is not None else []
    for sweep in sweeps:
        prepare_sweep(*sweep, _launch(config), lambda items, *_: items)
    if not sweeps:
        check_resume(prepare(config, _launch(config), lambda items, *_: items))


def _findings(runs: Sequence[Prepared]) -> Iterator[tuple[str, str]]:
    """What was found of runs that share base and images."""
    for prepared in runs[:1]:
        plan, base, records = prepared.plan, prepared.base, prepared.dataset.records
        yield "base", f"{base.path} is a whole {base.family} folder, {prepared.prediction_type} prediction"
        samples = f"{plan.num_samples} samples an epoch at {prepared.config.data.resolution} px"
        yield "images", f"{plan.num_images} can be read and have their captions: {samples}"
        yield "updates", f"{plan.num_steps} of {plan.global_batch} samples, {plan.num_epochs:.2f} epochs"
        for index in range(min(len(records), CAPTIONS_SHOWN)):
            record = records[index * len(records) // min(len(records), CAPTIONS_SHOWN)]
            yield "" if index else "captions", f"{record.name}: {quoted(record.captions[0])}"
        yield from (("", note) for note in prepared.dataset.notes)
        yield "targets", f"{plan.num_modules} layers get an adapter"
    warnings = (warning for prepared in runs for group in prepared.plan.param_groups for warning in group.warnings)
    yield from (("warning", warning) for warning in dict.fromkeys(warnings))
    yield from (("note", note) for note in dict.fromkeys(note for prepared in runs for note in notes(prepared)))
    for prepared in runs[:1]:
        yield from memory_rows(prepared)


def plan(config_file: Path, overrides: Sequence[str], num_processes: int | None) -> Sequence[TrialGroup]:
    """Print the plan of a run, or of a sweep, and how its numbers come about; what would be trained."""
    config, console = load_config(config_file, overrides), MainConsole()
    groups: Sequence[TrialGroup] = ()
    if config.sweep is None:
        prepared = prepare_plan(config, num_processes)
        check_resume(prepared)
        groups = [solo_group(prepared)]
        console.table(f"Plan of {config.name}", plan_rows(prepared))
    for sweep in _sweeps(config_file, overrides) if config.sweep is not None else ():
        planned = prepare_sweep(*sweep, _launch(config, num_processes), console.track)
        groups = planned.groups
        console.table(f"Plan of {planned.config.name}", sweep_rows(planned))
    for group in groups[:1]:
        console.table("How the numbers come about", explanation(group.shared))
    return groups


def explanation(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """Frequency, duration and intensity: how often, how long and how strongly the adapter is changed."""
    config, p = prepared.config, prepared.plan
    yield "samples", f"{p.num_samples} = the sum of images x repeats over {p.num_images} images"
    yield (
        "frequency",
        f"one update per {p.global_batch} samples = {p.num_processes} processes x {p.batch_size} images x "
        f"{p.accumulation} accumulated; only the product matters to the result",
    )
    buckets = "" if len(p.bucket_sizes) == 1 else f" in each of {len(p.bucket_sizes)} buckets"
    yield "", f"an epoch is {p.steps_per_epoch} updates = {p.num_samples} / {p.global_batch}, rounded up{buckets}"
    length = "train.max_steps" if config.train.max_steps is not None else f"{config.train.epochs} epochs x that"
    yield "duration", f"{p.num_steps} updates ({length}) = {p.num_epochs:.2f} epochs"
    yield "", f"each image is seen about {p.num_steps * p.global_batch / p.num_images:.0f} times"
    for group in p.param_groups:
        yield (
            f"intensity {group.name}",
            f"{group.schedule} from {group.lr_start:.2e} over {group.lr_peak:.2e} to {group.lr_end:.2e}: in sum "
            f"{group.lr_budget:.2f} of a constant LR over {p.num_steps} updates",
        )
    if optimizer_row(config.optimizer.type).decoupled_decay and config.optimizer.weight_decay:
        rates_summed = p.param_groups[0].lr_budget * config.optimizer.lr * p.num_steps
        shrink = 1 - math.exp(-config.optimizer.weight_decay * rates_summed)
        yield "", f"weight decay {config.optimizer.weight_decay:g} alone shrinks a weight by {shrink:.2%} over the run"
    scale = config.adapter.alpha / (config.adapter.rank**0.5 if config.adapter.use_rslora else config.adapter.rank)
    yield "", f"the adapter's output is scaled by {scale:g}, and with it the effect of the learning rate"


def list_presets() -> Iterator[tuple[str, str]]:
    yield from ((name, preset.purpose) for name, preset in PRESETS.items())


def show_preset(name: str) -> str:
    """A preset as YAML to paste and as words for the command line.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(Problem(f"`{name}` is no preset", fix=f"known: {', '.join(PRESETS)}"))
    preset, nested, text = PRESETS[name], Source({}), StringIO()
    for key, value in preset.settings.items():
        set_value(nested, key, value, None)
    YAML().dump(nested.data, text)
    words = " ".join(f"'{word}'" if " " in word else word for word in preset.overrides())
    return f"# {preset.purpose}\n{text.getvalue()}\n# on the command line:\n#   {words}\n"
