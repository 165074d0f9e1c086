"""`lora-trainer schedules`: every LR schedule named, explained and drawn before any GPU time is spent."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lora_trainer.cli.plan import prepare_plan
from lora_trainer.config.load import check_source, load_config
from lora_trainer.config.source import Source
from lora_trainer.config.structure import option_rows
from lora_trainer.errors import ConfigError, Problem, SystemSetupError
from lora_trainer.planning.run_plan import resolve_param_groups
from lora_trainer.report.pictures import Curve, draw_schedules, terminal_plot
from lora_trainer.schedules.registry import CLASSIC, SCHEDULES, PluginSchedule, TorchSchedule, plugin_names
from lora_trainer.schedules.schedule import (
    DecayOptions,
    Horizon,
    LRSchedule,
    ScheduleError,
    ScheduleFacts,
    ScheduleOptions,
    facts_of,
)
from lora_trainer.tracking.console import MainConsole

WEIGHT_DECAY = 0.01  # AdamW's default, for the shrink that `explain` shows
DEFAULT_STEPS, DEFAULT_LR = 1000, 1e-4
MOST_MARKS = 12  # rows of milestones or restarts before the rest is only counted
_SHARED = {*DecayOptions.model_fields, "min_ratio"}  # options that leave the form of a curve as its example has it
_PREVIEW = {
    "name": "preview",
    "model": {"path": "preview"},
    "data": {"dir": "preview"},
    "train": {"max_steps": 1},
    "validation": {"fraction": 0.1},
}


@dataclass(frozen=True, slots=True)
class Preview:
    """One schedule laid over a run."""

    label: str
    schedule: LRSchedule
    facts: ScheduleFacts
    options: ScheduleOptions


def list_schedules() -> Iterator[tuple[str, str]]:
    """Name and purpose of each schedule, the installed plug-ins too."""
    yield from ((name, options.summary) for name, options in SCHEDULES.items())
    yield from ((name, PluginSchedule.summary) for name in plugin_names())


def show_options(name: str) -> Iterator[tuple[str, str]]:
    """Each option with its values, default and meaning."""
    for key, values, default, text in option_rows(_options_class(name)):
        if key != "type":
            need = "required" if default == "**required**" else f"default {default}"
            yield key, f"{values}; {need}. {text}".replace("`", "")


def explain(words: Sequence[str], horizon: Horizon, lr: float) -> Iterator[tuple[str, str]]:
    """What a schedule is for, where it fails, and what it amounts to over a run.

    Args:
        words: its name, and any options as `key=value`.

    Raises:
        ConfigError: as `previews`.
    """
    names, _ = _split(words)
    if len(names) != 1:
        raise ConfigError(Problem("one schedule is explained at a time", fix="lora-trainer schedules explain cosine"))
    options = _options_class(names[0])
    yield "purpose", options.summary
    yield "limits", options.limits
    yield "formula", " ".join((options.__doc__ or "").split())
    (preview,) = named_previews(words, horizon, lr)
    yield from fact_rows(preview)
    shrink = f"{WEIGHT_DECAY} alone shrinks a weight by {preview.facts.shrink(WEIGHT_DECAY):.2%} over the run"
    yield "weight decay", f"{shrink} (1 - exp(-wd x sum of LRs))"
    yield "in a config", f"lr_scheduler: {json.dumps(_written(preview.options))}"


def fact_rows(preview: Preview) -> Iterator[tuple[str, str]]:
    """The numbers of a schedule over its run."""
    facts, num_steps = preview.facts, preview.schedule.horizon.num_steps
    options = [f"{key} {json.dumps(value)}" for key, value in _written(preview.options).items() if key != "type"]
    yield "options", ", ".join(options) or "all at their defaults"
    yield "over a run of", f"{num_steps} updates, {preview.schedule.horizon.steps_per_epoch} an epoch"
    yield "learning rate", f"first {facts.lrs[0]:.3e}, peak {facts.peak:.3e}, last {facts.lrs[-1]:.3e}"
    yield "LR budget", f"{facts.budget:.2f} of constant training at the base LR"
    yield "half-life", "never half" if facts.half_life is None else f"{facts.half_life} updates after the peak"
    marks = preview.schedule.marks
    for mark in marks[:MOST_MARKS]:
        yield f"at {mark.update}", mark.label
    if len(marks) > MOST_MARKS:
        yield "", f"and {len(marks) - MOST_MARKS} more like these"
    for warning in facts.warnings:
        yield "warning", warning


def previews(
    words: Sequence[str], config: Path | None, steps: int | None, lr: float | None, steps_per_epoch: int | None = None
) -> list[Preview]:
    """The schedules to draw: those named, or each group's of a config, or the classic six.

    Args:
        words: names of schedules; words of the form `key=value` are options for those of them that have the option,
            or, where a config is given and no name, overrides of the config.

    Raises:
        ConfigError: a name or an option is not known, or does not fit the run.
    """
    if config is None:
        return named_previews(words, example_horizon(steps, steps_per_epoch), DEFAULT_LR if lr is None else lr)
    names, _ = _split(words)
    prepared = prepare_plan(load_config(config, [] if names else words))
    planned = prepared.plan.horizon
    horizon = Horizon(steps or planned.num_steps, steps_per_epoch or planned.steps_per_epoch)
    if names:
        return named_previews(words, horizon, prepared.config.optimizer.lr if lr is None else lr)
    return [
        _preview(f"{group.name}: {group.options.type}", group.options, horizon, group.base_lr if lr is None else lr)
        for group in resolve_param_groups(prepared.config, horizon, prepared.base.denoiser)
    ]


def example_horizon(steps: int | None, steps_per_epoch: int | None) -> Horizon:
    """A run to show schedules on: of ten epochs, unless their length is said."""
    num_steps = steps or DEFAULT_STEPS
    return Horizon(num_steps, steps_per_epoch or max(1, num_steps // 10))


def named_previews(words: Sequence[str], horizon: Horizon, lr: float) -> list[Preview]:
    """The named schedules, or the classic six, with the options among the words."""
    names, options = _split(words)
    chosen = names or list(CLASSIC)
    taken = {key for name in chosen for key in _options_class(name).model_fields}
    shown = []
    for name in chosen:  # an option that nobody has goes to all, so that the refusal says who would take it
        fields = _options_class(name).model_fields
        given = {key: value for key, value in options.items() if key in fields or key not in taken}
        try:
            shown.append(_preview(name, _checked_options(name, given), horizon, lr))
        except ScheduleError as error:
            raise ConfigError(Problem(f"{name}: {error}", fix=f"lora-trainer schedules show {name}")) from None
    return shown


def _checked_options(name: str, given: Mapping[str, Any]) -> ScheduleOptions:
    """The options of a schedule, checked as in a configuration.

    Those that it requires, and those that show its form where none of its own are given, come from its example.
    """
    kind = _options_class(name)
    whole = not set(given) - _SHARED
    example = {key: value for key, value in kind.example.items() if whole or kind.model_fields[key].is_required()}
    return check_source(Source({**_PREVIEW, "lr_scheduler": {**example, **given, "type": name}})).lr_scheduler


def _preview(label: str, options: ScheduleOptions, horizon: Horizon, lr: float) -> Preview:
    schedule = options.resolve(horizon)
    return Preview(label, schedule, facts_of(options, schedule, lr), options)


def plot(
    words: Sequence[str],
    config: Path | None,
    steps: int | None,
    lr: float | None,
    steps_per_epoch: int | None = None,
    *,
    every: bool,
    output: Path | None,
    terminal: bool,
) -> None:
    """Draw the chosen schedules, print their numbers, and write the picture where one is asked for.

    Raises:
        ConfigError: as `previews`, or the picture's name does not end in .png.
        SystemSetupError: the picture cannot be written.
    """
    if output is not None and output.suffix.lower() != ".png":
        raise ConfigError(Problem("a picture is written as PNG", f"--output {output}", fix="end its name in .png"))
    console = MainConsole()
    if every:
        words = [*words, *(name for name, kind in SCHEDULES.items() if kind is not TorchSchedule)]
        console.print("`torch` is left out: it loads torch to be drawn; name it to see it")
    chosen = previews(words, config, steps, lr, steps_per_epoch)
    curves = [Curve(preview.label, preview.facts.lrs, preview.schedule.marks) for preview in chosen]
    title = f"Learning rate over {chosen[0].schedule.horizon.num_steps} updates"
    if terminal:
        width = min(120, shutil.get_terminal_size((100, 24)).columns)
        console.drawing(terminal_plot(curves, title=title, width=width))
    for preview in chosen:
        console.table(preview.label, fact_rows(preview))
    if output is not None:
        per_epoch = chosen[0].schedule.horizon.steps_per_epoch if config or steps_per_epoch else None
        try:
            draw_schedules(curves, output, title=title, steps_per_epoch=per_epoch)
        except OSError as error:
            what, fix = "the picture cannot be written", "choose another place"
            raise SystemSetupError(Problem(what, f"--output {output}", error.strerror, fix)) from error
        console.print(f"\nwrote {output}")


def _options_class(name: str) -> type[ScheduleOptions]:
    if name in SCHEDULES:
        return SCHEDULES[name]
    if ":" in name or name in plugin_names():
        return PluginSchedule
    close = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.5)
    fix = f"did you mean {close[0]}?" if close else "lora-trainer schedules list"
    raise ConfigError(Problem(f"`{name}` is no schedule", fix=f"{fix} Known: {', '.join(SCHEDULES)}"))


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Names, and the options given as `key=value`; the values are YAML."""
    names = [word for word in words if "=" not in word]
    pairs = (word.partition("=") for word in words if "=" in word)
    try:
        return names, {key: YAML(typ="safe").load(value) for key, _, value in pairs}
    except YAMLError as error:
        raise ConfigError(Problem(f"not valid YAML: {error}", "command line")) from error


def _written(options: ScheduleOptions) -> dict[str, Any]:
    """The options as they were given, with the type first."""
    return {"type": options.type, **options.model_dump(mode="json", exclude_unset=True)}
