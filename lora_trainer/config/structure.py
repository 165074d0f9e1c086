"""The sections and keys that a configuration may have and the values that they take, read off the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from lora_trainer.config.optimizers import OptimizerOptions, optimizer_row, outside_names
from lora_trainer.config.schema import RunConfig
from lora_trainer.schedules.registry import HIDDEN, PluginSchedule, plugin_names

SectionPath = tuple[str, ...]
_JSON_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true / false",
    "null": "null",
}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
UNDOCUMENTED = HIDDEN | {OptimizerOptions}
"""Models that stand in no list: hidden rows, and what an outside optimizer's own options stand for."""


def all_keys() -> list[str]:
    """Every dotted key of the configuration, once each."""
    keys = [*RunConfig.model_fields]
    for names, models in section_models(RunConfig).items():
        keys += [".".join((*names, key)) for model in models for key in model.model_fields]
    return list(dict.fromkeys(keys))


def text_kind(key: str) -> str | None:
    """`text` where a key takes nothing but text, `text or null` where it may be unset; None for any other key."""
    *section, name = key.split(".")
    models = section_models(RunConfig).get(tuple(section), []) if section else [RunConfig]
    annotations = [model.model_fields[name].annotation for model in models if name in model.model_fields]
    members = {kind for annotation in annotations for kind in getattr(annotation, "__args__", (annotation,))}
    kinds = {getattr(kind, "__origin__", kind) for kind in members}  # without what `Annotated` adds
    return "text" if kinds == {str} else "text or null" if kinds == {str, type(None)} else None


def section_models(
    model: type[BaseModel], path: SectionPath = (), around: tuple[type[BaseModel], ...] = ()
) -> dict[SectionPath, list[type[BaseModel]]]:
    """The models that may stand in each section, by its key path; one that may stand inside itself is not followed."""
    sections: dict[SectionPath, list[type[BaseModel]]] = {}
    for name, field in model.model_fields.items():
        inner = list(models_in(field.annotation))
        if inner and not set(inner) & set(around):
            sections[(*path, name)] = inner
            for inner_model in inner:
                sections |= section_models(inner_model, (*path, name), (*around, inner_model))
    return sections


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models named anywhere in a type annotation, but for those that are not told of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in UNDOCUMENTED:
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)


def models_by_type(path: SectionPath) -> dict[str, type[BaseModel]]:
    """What each `type` of a section stands for, those of installed packages too; empty where no `type` decides."""
    models = section_models(RunConfig).get(path, [])
    models_of = {type_name(model): model for model in models} if len(models) > 1 else {}
    if PluginSchedule in models:
        models_of |= dict.fromkeys(plugin_names(), PluginSchedule)
    if path == ("optimizer",):
        for name in outside_names():
            with suppress(ValueError):  # one that cannot be loaded is told of where it is asked for
                models_of[name] = optimizer_row(name).options
    return models_of


def type_name(model: type[BaseModel]) -> str:
    """What `type` says to choose this model."""
    default = model.model_fields["type"].default
    return default if isinstance(default, str) else "package.module:function"


def option_rows(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Key, values, default and meaning of each field of a section, in Markdown."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    if "$ref" in schema:  # a section that may stand inside itself
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    for name, field in model.model_fields.items():
        entry = schema["properties"][name]
        default = "**required**" if field.is_required() else f"`{json.dumps(entry.get('default'), ensure_ascii=False)}`"
        text = " ".join((field.description or "").split())
        yield name, _type(entry, definitions), default, text


def _type(entry: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in entry:
        return _type(definitions[entry["$ref"].rpartition("/")[2]], definitions)
    if options := entry.get("anyOf") or entry.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option, definitions) for option in options))
    if "enum" in entry:
        return " / ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if entry.get("type") == "array":
        if "prefixItems" in entry:
            return f"{len(entry['prefixItems'])} numbers"
        return f"list of {_type(entry['items'], definitions)}"
    if entry.get("type") == "object":
        return "mapping"
    kind = _JSON_TYPES[entry["type"]]
    limits = [f"{sign} {_number(entry[key])}" for key, sign in _LIMITS.items() if key in entry]
    return " ".join([kind, ", ".join(limits)]).strip()


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"
