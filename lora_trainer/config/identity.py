"""What may differ between a run and its resume, by the levels of `schema.LEVELS`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from lora_trainer.config.schema import CURVE_LENGTH, FACTS, LEVELS, Level, ResumeConfig, RunConfig
from lora_trainer.config.structure import section_models, type_name
from lora_trainer.errors import ConfigError, Problem

Identity = dict[str, Any]
GLOBAL_BATCH = "global batch"
RESOLVED = ("model.prediction_type", "train.precision", "train.threads")
"""Settings that are compared as what their `auto` became, once that is known."""

SHAPES_THE_STATE = (
    "adapter.type",
    "adapter.rank",
    "adapter.targets",
    "adapter.use_dora",
    "optimizer.type",
    "optimizer.groups",
    "train.ema_decay",
)
"""Settings whose change would leave saved tensors without a place, or places without a tensor."""


@dataclass(frozen=True, slots=True)
class Changes:
    """How a run differs from the one it continues, by key."""

    refused: tuple[str, ...]
    accepted: tuple[str, ...]
    """Would be refused, but `resume` allows them."""
    noted: tuple[str, ...]
    """May differ, and are named."""
    unknown: tuple[str, ...]
    """What the earlier version did not record: taken as unchanged."""


def level_of(key: str) -> Level | None:
    """The level of a setting or fact; None where the table has no row for it."""
    return LEVELS.get(key) or LEVELS.get(f"{key.partition('.')[0]}.*")


def identity_fields(config: RunConfig) -> Identity:
    """Every setting that is not free, by its dotted key, as JSON values."""
    return {key: value for key, value in sorted(_fields(config, "")) if level_of(key) != "free"}


def compare(before: Identity, now: Identity, allowed: ResumeConfig, where: str) -> Changes:
    """Sort what differs by its level. A setting that an older version lacked counts as its default.

    Raises:
        ConfigError: what `resume` allows is no setting, or cannot change.
    """
    _check_allowed(allowed, {*before, *now}, where)
    accepting = [*allowed.allow_changes, *([CURVE_LENGTH] if allowed.schedule == "stretch" else [])]
    late = {*FACTS, *RESOLVED}  # not known to every version, or not before the run starts
    unknown = [key for key in sorted(now) if key in late and before.get(key, "auto") == "auto"]
    levels = {key: level_of(key) for key in changed_keys(before, now) if key not in unknown and now.get(key) != "auto"}
    refusable = [key for key, level in levels.items() if level == "refuse"]
    accepted = [key for key in refusable if any(_covers(name, key) for name in accepting)]
    refused = [key for key in refusable if key not in accepted]
    noted = [key for key, level in levels.items() if level not in ("refuse", "free")]
    return Changes(tuple(refused), tuple(accepted), tuple(noted), tuple(unknown))


def refusal(before: Identity, now: Identity, refused: Sequence[str], where: str) -> Problem:
    """That a run, or a trial of a sweep, began otherwise; its name comes before."""
    listed = "\n         ".join(difference(before, now, refused))
    fixed = [key for key in refused if any(_covers(key, shape) or _covers(shape, key) for shape in SHAPES_THE_STATE)]
    accept = f"accept the change with 'resume.allow_changes=[{', '.join(refused)}]', "
    return Problem(
        "began with other settings or contents",
        where,
        f"changed since:\n         {listed}",
        f"set the old values to resume it, {'' if fixed else accept}give the new one another name, or start anew with "
        "--fresh",
    )


def completed(identity: Identity) -> Identity:
    """A stored identity with the global batch, which an earlier version stored in its parts."""
    parts = [identity.get(key) for key in ("num_processes", "train.batch_size", "train.gradient_accumulation_steps")]
    if GLOBAL_BATCH in identity or not all(isinstance(part, int) for part in parts):
        return identity
    return identity | {GLOBAL_BATCH: math.prod(part for part in parts if part is not None)}


def changed_keys(before: Identity, now: Identity) -> list[str]:
    """The keys whose value differs; a setting that one of both lacks counts as its default there."""
    return [key for key in sorted({*before, *now}) if _value(before, key) != _value(now, key)]


def difference(before: Identity, now: Identity, keys: Sequence[str] | None = None) -> list[str]:
    """One line per key whose value differs (of these keys only): `key: old -> new`."""
    chosen = changed_keys(before, now) if keys is None else keys
    return [f"{key}: {_value(before, key)} -> {_value(now, key)}" for key in chosen]


def _value(identity: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or its default in the schema; None for a fact or a setting without one."""
    if key in identity:
        return identity[key]
    section, _, name = key.rpartition(".")
    models = section_models(RunConfig).get(tuple(section.split(".")), []) if section else [RunConfig]
    kind = identity.get(f"{section}.type")
    for model in models:
        if name in model.model_fields and (len(models) == 1 or type_name(model) == kind):
            field = model.model_fields[name]
            return None if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
    return None


def _check_allowed(allowed: ResumeConfig, keys: set[str], where: str) -> None:
    problems = []
    for name in allowed.allow_changes:
        if any(_covers(name, fixed) or _covers(fixed, name) for fixed in SHAPES_THE_STATE):
            problems.append(
                Problem(
                    f"`{name}` cannot change in a run",
                    where,
                    "the saved adapter, optimizer or average would not fit",
                    "take it out of resume.allow_changes and start a run with another `name`",
                )
            )
        elif not any(_covers(name, key) for key in keys):
            near = difflib.get_close_matches(name, sorted(keys), n=1)
            guess = f"; did you mean `{near[0]}`?" if near else ""
            problems.append(
                Problem(f"`{name}` in resume.allow_changes is no setting of a run's identity{guess}", where)
            )
    if problems:
        raise ConfigError(*problems)


def _covers(allowed: str, key: str) -> bool:
    """A section's name covers all its keys."""
    return key == allowed or key.startswith(allowed + ".")


def _fields(section: BaseModel, prefix: str) -> list[tuple[str, Any]]:
    fields: list[tuple[str, Any]] = []
    plain = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            fields += _fields(value, f"{prefix}{name}.")
        else:
            fields.append((f"{prefix}{name}", plain[name]))
    return fields
