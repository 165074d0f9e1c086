"""Rules by which good files become hostile ones: YAML, JSON, rows of a log, headers of safetensors."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_trainer.config.schema import RunConfig
from lora_trainer.config.structure import all_keys, section_models

Labelled = Iterator[tuple[str, bytes]]
ESCAPES = "\x1b[31mred\x9b\u202e"
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("inf"),
    float("nan"),
    "",
    ESCAPES,
    "x" * 5000,
    [],
    {},
    [[1]],
    {"a": {"b": [None]}},
    "../../x",
    [1e-3, "1"],
)
"""What stands where something else is meant."""
TEXTS = (
    "",
    " ",
    "[",
    "{a: 1",
    "*a",
    "&a [*a]",
    "!!python/object:os.system 1",
    "1e999",
    "-1",
    ".nan",
    "nan",
    ESCAPES,
    "caf\udcff",
    "~",
    "9" * 5000,
    "[" * 3000,
    "0x10",
    "1_000",
    "{<<: {a: 1}}",
    "a: b: c",
    "'",
    "\0",
    "=",
    "~nosuchuser/x",
    "/dev/zero",
    "%YAML 1.1",
    "\u2028",
    "1e308",
    "{a: 1, a: 2}",
)
"""Overrides' values."""


def yaml_files(good: str) -> Labelled:
    """Syntax and structure: what is no YAML, what is another's, what grows, what is cut off."""
    text, lines = good.encode(), good.strip().splitlines()
    for number in range(0, len(text), max(1, len(text) // 8)):
        yield f"cut at {number}", text[:number]
        for odd in (b"\0", b"\xff", b"\x1b[31m", b"\t", "\u202e".encode()):
            yield f"{odd!r} at {number}", text[:number] + odd + text[number:]
    for number, line in enumerate(lines):
        yield f"line {number} twice", "\n".join([*lines, line]).encode()
    for name in ("utf-16", "utf-32", "utf-16-be", "cp1252"):
        yield name, (good + "# é").encode(name)
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    for name, odd_text in {
        "bomb": bomb,
        "lists": "[" * 100_000,
        "maps": "{a: " * 20_000,
        "indented": "".join(" " * n + "- \n" for n in range(1, 900)),
        "merge": f"{good}\nx: &x {{a: 1}}\ny: {{<<: *x}}",
        "tags": f"{good}\nx: !!python/object/apply:os.system [id]",
        "two documents": f"{good}\n---\n{good}",
        "a directive": f"%YAML 1.1\n%TAG ! tag:x,2000:\n---\n{good}",
        "a list": "- a\n- b",
        "a scalar": "3",
        "nothing": "",
        "comments": "# x\n" * 1000,
        "long": f"{good}\n#{'x' * 1_000_000}",
        "wide": "".join(f"k{n}: 1\n" for n in range(8000)),
        "complex keys": f"{good}\n? [a, b]\n: 1\n? {{c: d}}\n: 2",
        "odd keys": f"{good}\nnull: 1\ntrue: 2\n3: 4\n.nan: 5\n'\\e[31m': 6",
        "escapes": f'{good}\n"\\e[31m\\u202e": "\\x9b"',
        "base 60": f"{good}\nseed: 190:20:30",
        "a date": f"{good}\nseed: 2024-05-01",
    }.items():
        yield name, odd_text.encode()


def set_key(settings: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with a value at a key, of the type of section that has it; in a list of one where a list is wanted."""
    settings, path, node = copy.deepcopy(settings), (), {}
    node, models = settings, [RunConfig]
    for part in key.split(".")[:-1]:
        path = (*path, part)
        inner = node.get(part)
        is_list = any("tuple" in str(m.model_fields[part].annotation) for m in models if part in m.model_fields)
        if not inner or not isinstance(inner, list if is_list else dict):
            node[part] = inner = [{}] if is_list else {}
        node = inner[0] if isinstance(inner, list) else inner
        models = section_models(RunConfig).get(path, [])
    own = key.rpartition(".")[2]
    kind = next((m for m in models if own in m.model_fields and "type" in m.model_fields), None)
    if kind is not None and own != "type" and isinstance(kind.model_fields["type"].default, str):
        node.clear() if node.get("type") != kind.model_fields["type"].default else None
        node["type"] = kind.model_fields["type"].default
    node[own] = value
    return settings


def configurations(settings: dict[str, Any], stride: int = 1) -> Labelled:
    """Each key of the schema with values that it does not mean, in turn."""
    for number, key in enumerate(all_keys()):
        for turn in range(0, len(VALUES), stride):
            value = VALUES[(number + turn) % len(VALUES)]
            text = json.dumps(set_key(settings, key, value))
            yield f"{key}: {str(value)[:20]!a}", text.replace("Infinity", ".inf").replace("NaN", ".nan").encode()


def overrides(stride: int = 1) -> Iterator[str]:
    """Each key with texts that it does not mean, in turn."""
    for number, key in enumerate(all_keys()):
        for turn in range(0, len(TEXTS), stride):
            yield f"{key}={TEXTS[(number + turn) % len(TEXTS)]}"


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value, sections before what they hold."""
    if path:
        yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node[:2]) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


def with_value(content: Any, path: Sequence[Any], value: Any) -> Any:
    """A copy with another value at a path; without it where the value is `...`."""
    changed = copy.deepcopy(content)
    node = changed
    for part in path[:-1]:
        node = node[part]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return changed


def json_contents(content: Any, stride: int = 1, values: Sequence[Any] = (..., *VALUES)) -> Labelled:
    """Each place with a value that it does not mean, or without its own, in turn."""
    for number, path in enumerate(places(content)):
        for turn in range(0, len(values), stride):
            value = values[(number + turn) % len(values)]
            yield f"{path}: {str(value)[:20]!a}", json.dumps(with_value(content, path, value)).encode()


def json_files(content: Any) -> Labelled:
    """What is no JSON, or none that anybody meant."""
    whole = json.dumps(content).encode()
    yield from {
        "empty": b"",
        "null": b"null",
        "a list": b"[]",
        "a number": b"3",
        "a text": b'"x"',
        "an empty object": b"{}",
        "cut": whole[: len(whole) // 2],
        "NULs": b"\0" * 64,
        "no UTF-8": b'\xff\xfe{"a": "\xe9"}',
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "NaN": b"NaN",
        "large number": b'{"a": ' + b"9" * 5000 + b"}",
        "twice": whole[:-1] + b"," + whole[1:],
        "escapes": json.dumps({ESCAPES: ESCAPES}).encode(),
        "two": whole + whole,
        "YAML": b"a: [1, 2\n",
        "a bomb": b"[" + b"[1,1,1,1]," * 200_000 + b"1]",
    }.items()


def tensor_files(good: Path) -> Labelled:
    """Headers and payloads that do not belong together."""
    whole = good.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, payload = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    name = next(key for key in sorted(header) if key != "__metadata__")

    def joined(changed: Any, tail: bytes = payload) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + tail

    for number in (0, 1, 8, 2**31, 2**63, 2**64 - 1, length - 1, length + 1):
        yield f"length {number}", number.to_bytes(8, "little") + whole[8:]
    for label, odd in json_files(header):
        yield f"header: {label}", joined(odd)
    for label, odd in json_contents({"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}, 3):
        yield f"{name}: {label}", joined({**header, name: json.loads(odd)})
    for size in (0, 3, 8, 9, 8 + length, len(whole) - 1):
        yield f"cut at {size}", whole[:size]
    yield "more at the end", whole + b"x"
    yield "no tensors", joined({}, b"")
    yield "LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    yield "HTML", b"<!DOCTYPE html><html>"
    yield "a pickle", b"\x80\x04\x95" + bytes(60)


def rows(good: dict[str, Any], stride: int = 1) -> Labelled:
    """Lines of a log that say it wrongly."""
    yield from json_contents(good, stride)
    yield from json_files(good)
