"""Which settings decide what is learned. A resume must agree on them; observational ones may change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from lora_trainer.config.schema import RunConfig
from lora_trainer.strict_model import Observational

CURVE_LENGTH = "lr curve length"
"""Identity key: the number of updates that the LR curves are laid over."""
_MISSING = "(not set)"


def identity_fields(config: RunConfig) -> dict[str, Any]:
    """Every identity setting by its dotted key, as JSON values."""
    return dict(sorted(_fields(config, "")))


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys whose value differs, or that only one of both has."""
    return [key for key in sorted({*before, *now}) if before.get(key, _MISSING) != now.get(key, _MISSING)]


def difference(before: dict[str, Any], now: dict[str, Any], keys: Sequence[str] | None = None) -> list[str]:
    """One line per key whose value differs (of these keys only): `key: old -> new`."""
    chosen = changed_keys(before, now) if keys is None else keys
    return [f"{key}: {before.get(key, _MISSING)} -> {now.get(key, _MISSING)}" for key in chosen]


def _fields(section: BaseModel, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        if any(isinstance(mark, Observational) for mark in field.metadata):
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found += _fields(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", plain[name]))
    return found
