"""Read a YAML 1.2 file and `key.path=value` overrides into plain data, remembering where each value was written."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path as FilePath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lora_trainer.errors import ConfigError, Problem

MAX_BYTES = 1_000_000
BY_TYPE = frozenset({"optimizer", "lr_scheduler"})
"""Sections for which their `type` alone may stand: `lr_scheduler: cosine`."""
KeyPath = tuple[str | int, ...]


@dataclass
class Source:
    """Plain data and, for each key path, the place where it was written (`file:line` or `command line`)."""

    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str | None:
        """Where the key, or the closest section around it, was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return None


def read_source(file: FilePath, overrides: Sequence[str] = ()) -> Source:
    """Read the file, then lay the overrides over it from left to right.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or an override has no `key=value` form.
    """
    source = Source(*_read_file(file))
    problems: list[Problem] = []
    for text in overrides:
        place = f"command line, {text}"
        try:
            set_value(source, *split_override(text, place), place)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return source


def _read_file(file: FilePath) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    try:
        raw = file.read_bytes()
        if len(raw) > MAX_BYTES:
            raise ConfigError(Problem(f"the file is larger than {MAX_BYTES:,} bytes", where=str(file)))
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            Problem("the file is not UTF-8", str(file), f"byte {error.start}", "save it as UTF-8 text")
        ) from error
    except OSError as error:
        raise ConfigError(
            Problem("the configuration file cannot be read", str(file), error.strerror, "check --config FILE")
        ) from error
    parsed = _parse(text, str(file))
    if not isinstance(parsed, CommentedMap):
        raise ConfigError(
            Problem("a configuration is a mapping of sections", str(file), fix="start from configs/demo.yaml")
        )
    places: dict[KeyPath, str] = {(): str(file)}
    return _plain(parsed, (), str(file), places), places


def _parse(text: str, where: str) -> Any:
    yaml = YAML()
    yaml.version = (1, 2)
    try:
        return yaml.load(StringIO(text))
    except DuplicateKeyError as error:
        raise ConfigError(
            Problem(
                str(error.problem).split("with value")[0].strip(),
                _at(where, error),
                "a second value would silently win over the first",
                "remove one of the two lines",
            )
        ) from error
    except MarkedYAMLError as error:
        raise ConfigError(Problem(f"not valid YAML: {error.problem}", _at(where, error))) from error
    except YAMLError as error:
        raise ConfigError(Problem(f"not valid YAML: {error}", where)) from error


def _at(where: str, error: MarkedYAMLError) -> str:
    return f"{where}:{error.problem_mark.line + 1}" if error.problem_mark else where


def _plain(node: Any, path: KeyPath, where: str, places: dict[KeyPath, str]) -> Any:
    """Plain dicts, lists and scalars of a parsed node; notes the line of each key on the way."""
    if getattr(getattr(node, "tag", None), "value", None) is not None:
        place = places.get(path, where)
        raise ConfigError(Problem(f"a YAML tag ({node.tag.value}) has no meaning here", place, fix="remove it"))
    if isinstance(node, CommentedMap):
        for key in node:
            places[(*path, key)] = f"{where}:{node.lc.key(key)[0] + 1}"
        return {key: _plain(value, (*path, key), where, places) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            places[(*path, index)] = f"{where}:{node.lc.item(index)[0] + 1}"
        return [_plain(value, (*path, index), where, places) for index, value in enumerate(node)]
    return next((kind(node) for kind in (bool, int, float, str) if isinstance(node, kind)), node)


def split_override(text: str, place: str | None) -> tuple[str, Any]:
    """The key path of a `key.path=value`, and its value, which is YAML.

    Raises:
        ConfigError: it has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise _no_override(text, place)
    return key, _plain(_parse(value, f"{place}, {text}"), (), "", {})


def set_value(source: Source, key: str, value: Any, place: str | None) -> None:
    """Set the value at a key path; a mapping replaces the whole section.

    Args:
        place: where it was written.

    Raises:
        ConfigError: there is no such place; nothing was changed then.
    """
    path = tuple(key.split("."))
    if not all(path):
        raise _no_override(key, place)
    node: Any = source.data
    for part in path[:-1]:
        if node.get(part) is None:
            node[part] = {}
        if part in BY_TYPE and isinstance(node[part], str):
            node[part] = {"type": node[part]}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(Problem(f"`{part}` is no section, so `{key}` cannot be set", place))
    node[path[-1]] = copy.deepcopy(value)
    source.places = {known: where for known, where in source.places.items() if known[: len(path)] != path}
    if place is not None:
        source.places[path] = place


def _no_override(text: str, place: str | None) -> ConfigError:
    return ConfigError(Problem(f"`{text}` is no override", place, fix="write key.path=value, as in optimizer.lr=3e-4"))
