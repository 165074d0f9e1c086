"""Which settings decide what is learned. A resume must agree on them; observational ones may change."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from lora_trainer.config.schema import RunConfig
from lora_trainer.section import Observational


def identity_fields(config: RunConfig) -> dict[str, Any]:
    """Every identity setting by its dotted key, as JSON values."""
    return dict(sorted(_fields(config, "")))


def difference(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per key whose value differs: `key: old -> new`."""
    missing = "(not set)"
    return [
        f"{key}: {before.get(key, missing)} -> {now.get(key, missing)}"
        for key in sorted({*before, *now})
        if before.get(key, missing) != now.get(key, missing)
    ]


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
