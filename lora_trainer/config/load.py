"""Turn what the user wrote into a checked, frozen `RunConfig`, or into one report of everything that is wrong."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from lora_trainer.config.conflicts import conflicts
from lora_trainer.config.names import LACKED, PEER_NAMES, type_called
from lora_trainer.config.optimizers import AdamW
from lora_trainer.config.places import PLAN_FILE
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.source import BY_TYPE, KeyPath, Source, read_source
from lora_trainer.config.structure import all_keys, models_by_type, section_models, type_name
from lora_trainer.errors import ConfigError, Problem

MAX_PROBLEMS, MAX_SHOWN = 50, 200


def load_config(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and check a configuration.

    Raises:
        ConfigError: with every problem found, each with its place and a fix.
    """
    return check_source(read_source(file, overrides))


def check_source(source: Source) -> RunConfig:
    """The checked configuration of plain data.

    Raises:
        ConfigError: as `load_config`.
    """
    optimizer = source.data.get("optimizer")
    groups = optimizer.get("groups") if isinstance(optimizer, dict) else None
    for node in (source.data, *(groups if isinstance(groups, list) else [])):
        for section in BY_TYPE & node.keys() if isinstance(node, dict) else ():
            if isinstance(kind := node[section], str):
                node[section] = {"type": kind}
    if problems := list(islice(_unwritable(source.data, (), source), MAX_PROBLEMS)):
        raise ConfigError(*problems)
    try:
        config = RunConfig.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError(*_problems(error, source)) from None
    if problems := [replace(problem, where=source.place(key)) for key, problem in conflicts(config)]:
        raise ConfigError(*problems)
    return config


def _unwritable(node: Any, path: KeyPath, source: Source) -> Iterator[Problem]:
    """Texts that no file or path can hold: with a NUL, or with half a character."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _unwritable(key, path, source)
            yield from _unwritable(value, (*path, key), source)
    elif isinstance(node, str) and (odd := re.search("[\0\ud800-\udfff]", node)):
        yield Problem(f"`{_dotted(path)}` holds U+{ord(odd[0]):04X}, which is no text", source.place(path))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, every default written out; reading it again gives an equal one."""
    text = StringIO()
    yaml = YAML()
    yaml.version = (1, 2)
    yaml.explicit_start = False
    yaml.width = 100
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    yaml.representer.add_representer(str, _quoted_where_odd)
    yaml.dump(config.model_dump(mode="json"), text)
    return text.getvalue().removeprefix("%YAML 1.2\n---\n")


def _quoted_where_odd(dumper: Any, text: str) -> Any:
    """Line breaks other than the usual one, and what nobody sees, survive only in double quotes, as escapes."""
    odd = any(not (letter.isprintable() or letter == "\n") for letter in text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)


def _problems(error: ValidationError, source: Source) -> Iterator[Problem]:
    """One problem per key, however many alternatives of a union complained about it."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors():
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # long enough as written: its items were found faulty, which is told of each
        by_path.setdefault(_written_path(detail["loc"], source.data), []).append(detail)
    for path, details in islice(by_path.items(), MAX_PROBLEMS):
        yield _problem(path, details, source)
    if len(by_path) > MAX_PROBLEMS:
        yield Problem(f"and {len(by_path) - MAX_PROBLEMS:,} more like these")


def _written_path(loc: tuple[str | int, ...], data: Any) -> KeyPath:
    """A pydantic location without the names of union members, which nobody wrote."""
    path: list[str | int] = []
    node: Any = data
    for position, part in enumerate(loc):
        if part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int):
            node = node[part]
            path.append(part)
        elif isinstance(node, dict) and position == len(loc) - 1 and not (part == "schedule" and _is_phase(path)):
            path.append(part)
    return tuple(path)


def _is_phase(path: Sequence[str | int]) -> bool:
    """Whether a path leads to a phase, which holds the keys of its schedule beside its own."""
    return len(path) > 1 and path[-2] == "phases"


def _problem(path: KeyPath, details: list[ErrorDetails], source: Source) -> Problem:
    key = _dotted(path)
    kinds = {detail["type"] for detail in details}
    where = source.place(path)
    if "extra_forbidden" in kinds:
        return _unknown_key(path, source, where)
    if "missing" in kinds:
        return Problem(f"`{key}` is required", where, fix=f"add {key}: ... (docs/config.md)")
    if "union_tag_not_found" in kinds:
        known = _models_by_type(path) or _models_by_type(path[:-1])
        return Problem(f"`{key}` needs a `type`", where, fix=f"add `type` to it, one of: {', '.join(known)}")
    if "union_tag_invalid" in kinds:
        return _unknown_type(path, str(details[0]["ctx"]["tag"]), source.place((*path, "type")))
    expectations = dict.fromkeys(_expectation(detail) for detail in details)
    value = details[0]["input"]
    fix = "put it in quotes" if "string_type" in kinds and isinstance(value, bool | int | float) else None
    return Problem(f"`{key}`: {', or '.join(expectations)}", where, f"it is {_shown(value)}", fix)


def _shown(value: Any) -> str:
    """What was written, cut where it is long, with the names of letters in it that look like others."""
    text = repr(value)
    text = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    odd = dict.fromkeys(letter for letter in text if not letter.isascii() and not letter.isalpha())
    names = [f"U+{ord(letter):04X} {unicodedata.name(letter, '')}".strip() for letter in odd]
    return f"{text}, with {', '.join(names)}" if names else text


def _expectation(detail: ErrorDetails) -> str:
    text = detail["msg"].removeprefix("Value error, ").replace(" after validation", "")
    return text.replace("Input should be", "expected").replace("a valid tuple", "a list").replace("Tuple", "a list")


def _unknown_key(path: KeyPath, source: Source, where: str | None) -> Problem:
    name = str(path[-1]).replace("-", "_")
    siblings = _known_keys(path[:-1], source.data)
    section = _dotted(path[:-1]) or "the top level"
    what = f"`{_dotted(path)}` is not a setting"
    if owners := _owners(path[:-1], name):
        return Problem(
            f"`{_dotted(path)}` has no effect on this `{section}.type`",
            where,
            f"its options are: {', '.join(siblings)}",
            f"remove it, or choose a type that has it: {', '.join(owners)}",
        )
    around = next((str(part) for part in path[-2::-1] if isinstance(part, str)), "").replace("phases", "lr_scheduler")
    if ours := PEER_NAMES.get(f"{around}.{name}") or PEER_NAMES.get(name):
        others = [] if ours.rpartition(".")[2] in siblings else _owners(path[:-1], ours.rpartition(".")[2])
        of = f", an option of type {' or '.join(others)}" if others else ""
        return Problem(what, where, fix=f"here it is called `{ours}`{of}")
    if name in LACKED:
        return Problem(f"{what}: other trainers have it, this one does not", where, fix=f"remove it: {LACKED[name]}")
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if close:
        return Problem(what, where, fix=f"did you mean `{close[0]}`?")
    elsewhere = [f"`{key}`" for key in _keys_called(name)]
    fix = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"settings of {section}: {', '.join(siblings)}"
    return Problem(what, where, fix=fix)


def setting_called(name: str) -> str | None:
    """The key of the setting that somebody calls so: its own, the last part of one, or another trainer's name."""
    name = name.replace("-", "_")
    called = sorted(_keys_called(name), key=lambda key: not key.startswith("train."))
    return name if name in all_keys() else PEER_NAMES.get(name) or next(iter(called), None)


def _keys_called(name: str) -> list[str]:
    return [key for key in all_keys() if key.rpartition(".")[2] == name and ".groups." not in key]


def _owners(section: KeyPath, name: str) -> list[str]:
    """The types of a section that have this option."""
    return [kind for kind, model in _models_by_type(section).items() if name in model.model_fields]


def _unknown_type(section: KeyPath, written: str, where: str | None) -> Problem:
    known = list(_models_by_type(section))
    ours = type_called(written, known)
    fix = f"known: {', '.join(known)}" if ours is None else f"did you mean `{ours}`?"
    if where and (Path(where).parent / PLAN_FILE).is_file():
        fix = "install the package that has it: this run was trained with it"
    elif ours == "torch":
        fix = f"write type: torch and target: {written}"
    return Problem(f"`{_dotted(section)}.type: {written}` is not known", where, fix=fix)


def _models_by_type(section: KeyPath) -> dict[str, type[BaseModel]]:
    """What may stand in a section where `type` decides, a phase's too; empty for any other section."""
    names = tuple(part for part in section if isinstance(part, str))
    return models_by_type(names[:-1] if _is_phase(section) else names)


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _known_keys(path: KeyPath, data: dict[str, Any]) -> list[str]:
    """The keys that the section at this path may have, as far as what is written there decides it."""
    names = tuple(part for part in path if isinstance(part, str))
    node: Any = data
    for part in path:
        node = node.get(part, {}) if isinstance(node, dict) else node[int(part)]
    kind = node.get("type") if isinstance(node, dict) else None
    if names == ("optimizer",) and kind is None:
        kind = type_name(AdamW)
    chosen = [model for own, model in _models_by_type(path).items() if own == kind]
    if _is_phase(path) or not chosen:  # a phase holds its schedule's keys beside its own
        chosen = [*(section_models(RunConfig).get(names, []) if names else [RunConfig]), *chosen]
    return list(dict.fromkeys(key for model in chosen for key in model.model_fields))
