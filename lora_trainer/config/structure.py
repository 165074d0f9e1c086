"""The sections and keys that a configuration may have, read off the schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from lora_trainer.config.schema import RunConfig

SectionPath = tuple[str, ...]


def all_keys() -> list[str]:
    """Every dotted key of the configuration, once each."""
    keys = [*RunConfig.model_fields]
    for names, models in section_models(RunConfig).items():
        keys += [".".join((*names, key)) for model in models for key in model.model_fields]
    return list(dict.fromkeys(keys))


def section_models(
    model: type[BaseModel], path: SectionPath = (), around: tuple[type[BaseModel], ...] = ()
) -> dict[SectionPath, list[type[BaseModel]]]:
    """The models that may stand in each section, by its key path; one that may stand inside itself is not followed."""
    found: dict[SectionPath, list[type[BaseModel]]] = {}
    for name, field in model.model_fields.items():
        inner = list(models_in(field.annotation))
        if inner and not set(inner) & set(around):
            found[(*path, name)] = inner
            for each in inner:
                found |= section_models(each, (*path, name), (*around, each))
    return found


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models named anywhere in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)


def type_name(model: type[BaseModel]) -> str:
    """What `type` says to choose this model."""
    default = model.model_fields["type"].default
    return default if isinstance(default, str) else "package.module:function"
