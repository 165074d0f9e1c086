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
from ruamel.yaml.constructor import DuplicateKeyError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent

from lora_trainer.config.structure import text_kind
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.storage.atomic_files import read_regular

MAX_BYTES, MAX_NODES, MAX_DEPTH = 1_000_000, 10_000, 40
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
        text = read_regular(file, MAX_BYTES).decode("utf-8-sig")
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
    yaml.Constructor = _Constructor
    try:
        _check_events(yaml, text, where)
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
    except (YAMLError, ValueError, OverflowError) as error:  # as a whole number of 5,000 digits
        raise ConfigError(Problem(f"not valid YAML: {error}", where)) from error


class _Constructor(RoundTripConstructor):
    """A date is text, as YAML 1.2 has it."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))


def _check_events(yaml: YAML, text: str, where: str) -> None:
    """Refuse what could grow without bounds, or says something else than it seems to, before anything is built.

    Raises:
        ConfigError: it holds an alias, a merge key or a tag, or too much in all.
    """
    num_nodes = depth = 0
    for event in yaml.parse(StringIO(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        num_nodes += isinstance(event, NodeEvent)
        place = f"{where}:{event.start_mark.line + 1}"
        if isinstance(event, AliasEvent):
            raise ConfigError(Problem(f"a YAML alias (*{event.anchor}) is not taken", place, fix="write it out"))
        if isinstance(event, ScalarEvent) and event.value == "<<" and event.implicit[0]:
            raise ConfigError(Problem("a YAML merge key (<<) is not taken", place, fix="write its keys out"))
        if tag := getattr(event, "tag", None):
            raise ConfigError(Problem(f"a YAML tag ({tag}) has no meaning here", place, fix="remove it"))
        if num_nodes > MAX_NODES or depth > MAX_DEPTH:
            what = f"more than {MAX_NODES:,} keys and values, or {MAX_DEPTH} levels of them, are no configuration"
            raise ConfigError(Problem(what, place))


def _at(where: str, error: MarkedYAMLError) -> str:
    return f"{where}:{error.problem_mark.line + 1}" if error.problem_mark else where


def _plain(node: Any, path: KeyPath, where: str, places: dict[KeyPath, str]) -> Any:
    """Plain dicts, lists and scalars of a parsed node; notes the line of each key on the way."""
    if isinstance(node, CommentedMap):
        for key in node:
            places[(*path, key)] = f"{where}:{node.lc.key(key)[0] + 1}"
        return {key: _plain(value, (*path, key), where, places) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            places[(*path, index)] = f"{where}:{node.lc.item(index)[0] + 1}"
        return [_plain(value, (*path, index), where, places) for index, value in enumerate(node)]
    return next(
        (kind(node) for kind in (bool, int, float, str) if isinstance(node, kind)), getattr(node, "value", node)
    )


def split_override(text: str, place: str | None) -> tuple[str, Any]:
    """The key path of a `key.path=value`, and its value: the text itself where the setting is text, else YAML.

    Raises:
        ConfigError: it has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise _no_override(text, place)
    kind = text_kind(key)
    if kind == "text" or (kind == "text or null" and value.strip() not in ("", "~", "null")):
        return key, value
    parsed = _plain(_parse(value, place or text), (), "", {})
    written = value.strip()
    return key, written if isinstance(parsed, str) and written[0] not in "\"'|>" else parsed


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
