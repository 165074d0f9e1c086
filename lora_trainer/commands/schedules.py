"""`lora-trainer schedules`: every LR schedule named, explained and drawn before any GPU time is spent."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.text import Text
from ruamel.yaml import YAML

from lora_trainer.commands.plan import prepare_plan
from lora_trainer.config.describe import option_rows
from lora_trainer.config.load import load_config
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.plan import lay_groups
from lora_trainer.report.schedule_plot import Curve, draw_schedules, terminal_plot
from lora_trainer.schedules.durations import Horizon, ScheduleError
from lora_trainer.schedules.external import PluginSchedule, plugin_names
from lora_trainer.schedules.facts import ScheduleFacts, facts_of
from lora_trainer.schedules.options import ScheduleOptions
from lora_trainer.schedules.registry import CLASSIC, SCHEDULES, LRSchedulerOptions
from lora_trainer.schedules.schedule import LRSchedule
from lora_trainer.tracking.console import Screen

WEIGHT_DECAY = 0.01  # AdamW's default, for the shrink that `explain` shows


@dataclass(frozen=True, slots=True)
class Preview:
    """One schedule laid over a run."""

    label: str
    schedule: LRSchedule
    facts: ScheduleFacts


def list_schedules() -> Iterator[tuple[str, str]]:
    """Name and purpose of each schedule, the installed plug-ins too."""
    yield from ((name, options.summary) for name, options in SCHEDULES.items())
    yield from ((name, PluginSchedule.summary) for name in plugin_names())


def show_options(name: str) -> Iterator[tuple[str, str]]:
    """Each option with its values, default and meaning."""
    for key, values, default, text in option_rows(_options_class(name)):
        if key != "type":
            yield key, f"{values}; default {default.strip('*`')}. {text}"


def explain(name: str, steps: int, lr: float) -> Iterator[tuple[str, str]]:
    """What a schedule is for, where it fails, and what it amounts to over a run of `steps`."""
    options = _options_class(name)
    yield "purpose", options.summary
    yield "limits", options.limits
    yield "formula", " ".join((options.__doc__ or "").split())
    preview = preview_name(name, {}, Horizon(steps, max(1, steps // 10)), lr)
    yield from fact_rows(preview)
    shrink = preview.facts.shrink(WEIGHT_DECAY)
    yield (
        "weight decay",
        f"{WEIGHT_DECAY} alone shrinks a weight by {shrink:.2%} over the run (1 - exp(-wd x sum of LRs))",
    )
    yield "in a config", _as_yaml(options)


def fact_rows(preview: Preview) -> Iterator[tuple[str, str]]:
    """The numbers of a schedule over its run."""
    facts, num_updates = preview.facts, preview.schedule.horizon.num_updates
    yield "over a run of", f"{num_updates} updates, {preview.schedule.horizon.updates_per_epoch} an epoch"
    yield "learning rate", f"first {facts.first:.3e}, peak {facts.peak:.3e}, last {facts.last:.3e}"
    yield "LR budget", f"{facts.budget:.2f} of constant training at the peak"
    yield "half-life", "never half" if facts.half_life is None else f"{facts.half_life} updates after the peak"
    for mark in preview.schedule.marks:
        yield f"at {mark.update}", mark.label
    for warning in facts.warnings:
        yield "warning", warning


def previews(names: Sequence[str], config: Path | None, steps: int | None, lr: float | None) -> list[Preview]:
    """The schedules to draw: those named, or each group's of a config, or the classic six.

    Words of the form `key=value` are options for those of the named schedules that have them.

    Raises:
        ConfigError: a name or an option is not known.
    """
    chosen = [word for word in names if "=" not in word]
    options = dict(_option(word) for word in names if "=" in word)
    horizon, base_lr = Horizon(steps or 1000, max(1, (steps or 1000) // 10)), lr or 1e-4
    if config is not None:
        prepared = prepare_plan(load_config(config))
        if not chosen:
            return config_previews(prepared, steps, lr)
        horizon, base_lr = prepared.plan.horizon, lr or prepared.config.optimizer.lr
        horizon = horizon if steps is None else Horizon(steps, horizon.updates_per_epoch)
    unused = [key for key in options if not any(key in _options_class(n).model_fields for n in chosen or CLASSIC)]
    if unused:
        raise ConfigError(Problem(f"`{unused[0]}` is no option of {', '.join(chosen or CLASSIC)}"))
    return [preview_name(name, options, horizon, base_lr) for name in chosen or CLASSIC]


def config_previews(prepared: Any, steps: int | None, lr: float | None) -> list[Preview]:
    """The schedules of a config's groups over its planned run."""
    horizon = prepared.plan.horizon if steps is None else Horizon(steps, prepared.plan.updates_per_epoch)
    return [
        Preview(f"{g.name}: {g.options.type}", g.schedule, facts_of(g.options, g.schedule, lr or g.base_lr))
        for g in lay_groups(prepared.config, horizon)
    ]


def preview_name(name: str, options: dict[str, Any], horizon: Horizon, lr: float) -> Preview:
    """A schedule by its name, with its example options and those given.

    Raises:
        ConfigError: it does not take the options, or they do not fit the run.
    """
    kind = _options_class(name)
    own = {key: value for key, value in options.items() if key in kind.model_fields}
    try:
        chosen: ScheduleOptions = TypeAdapter(LRSchedulerOptions).validate_python({"type": name, **kind.example, **own})
        schedule = chosen.resolve(horizon)
        return Preview(name, schedule, facts_of(chosen, schedule, lr))
    except (ValidationError, ScheduleError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(Problem(f"{name}: {reason}", fix=f"lora-trainer schedules show {name}")) from None


def plot(
    names: Sequence[str],
    config: Path | None,
    steps: int | None,
    lr: float | None,
    *,
    every: bool,
    output: Path | None,
    terminal: bool,
) -> None:
    """Draw the chosen schedules, print their numbers, and write the picture where one is asked for."""
    chosen = previews([*names, *(SCHEDULES if every else ())], config, steps, lr)
    curves = [Curve(each.label, each.facts.lrs, each.schedule.marks) for each in chosen]
    title = f"Learning rate over {chosen[0].schedule.horizon.num_updates} updates"
    screen = Screen()
    if terminal:
        width = min(120, shutil.get_terminal_size((100, 24)).columns)
        screen.console.print(Text.from_ansi(terminal_plot(curves, title=title, width=width)))
    for each in chosen:
        screen.table(each.label, fact_rows(each))
    if output is not None:
        per_epoch = chosen[0].schedule.horizon.updates_per_epoch if config is not None else None
        draw_schedules(curves, output, title=title, updates_per_epoch=per_epoch)
        screen.say(f"\nwrote {output}")


def _options_class(name: str) -> type[ScheduleOptions]:
    if name in SCHEDULES:
        return SCHEDULES[name]
    if ":" in name or name in plugin_names():
        return PluginSchedule
    close = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.5)
    fix = f"did you mean {close[0]}?" if close else "lora-trainer schedules list"
    raise ConfigError(Problem(f"`{name}` is no schedule", fix=f"{fix} Known: {', '.join(SCHEDULES)}"))


def _option(word: str) -> tuple[str, Any]:
    key, _, value = word.partition("=")
    return key, YAML(typ="safe").load(value)


def _as_yaml(options: type[ScheduleOptions]) -> str:
    kind = options.model_fields["type"].default
    inner = {"type": kind, **options.example} if isinstance(kind, str) else options.example
    return "lr_scheduler: " + json.dumps(inner)
