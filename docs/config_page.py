"""The configuration as a page for people: `docs/config.md`, one of the pages of docs/make_docs.py."""

from __future__ import annotations

from pydantic import BaseModel

from lora_trainer.config.identity import level_of
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.structure import SectionPath, option_rows, section_models, type_name

_HEAD = """\
# Configuration

One YAML 1.2 file, and `key.path=value` on the command line (applied from left to right; a mapping replaces the whole
section). Unknown keys, wrong types and settings without effect are refused before anything is loaded.

Lengths and periods are optimizer updates (`100`), epochs (`"2ep"`) or a share of the run (`"5%"`).
Keys marked *may change* can differ between a run and its resume, *said* where that may move the last bits; all others
are the run's identity.

This page is written by `docs/make_docs.py` from the schema.
"""


def describe() -> str:
    """The whole page in Markdown."""
    sections = section_models(RunConfig)
    inner: dict[SectionPath, set[str]] = {}
    for names in sections:
        inner.setdefault(names[:-1], set()).add(names[-1])
    parts = [_HEAD, "## Top level\n", _table(RunConfig, "", inner[()])]
    told: dict[frozenset[type[BaseModel]], str] = {}
    for names in sorted(sections, key=len):
        told.setdefault(frozenset(sections[names]), ".".join(names))
    for names, models in sections.items():
        title = ".".join(names)
        if (same := told[frozenset(models)]) != title:
            parts.append(f"## {title}\n\nAs [{same}](#{same}).\n")
            continue
        if len(models) == 1:
            parts += [f"## {title}\n", f"{_summary(models[0])}\n", _table(models[0], title, inner.get(names, set()))]
            continue
        parts.append(f"## {title}\n\n`type` says which; each type has its own keys.\n")
        for model in models:
            parts += [f"### {title}.type: {type_name(model)}\n", f"{_summary(model)}\n"]
            parts.append(_table(model, title, {"type", *inner.get(names, ())}))
    return "\n".join(parts)


def _summary(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _table(model: type[BaseModel], section: str, skip: set[str]) -> str:
    """The keys of a section, but for those that are told elsewhere."""
    rows = [
        f"| `{name}` | {values} | {default} | {text}{_marked(section, name)} |"
        for name, values, default, text in option_rows(model)
        if name not in skip
    ]
    if not rows:
        return "No keys of its own.\n"
    return "\n".join(["| key | value | default | |", "|---|---|---|---|", *rows]) + "\n"


def _marked(section: str, name: str) -> str:
    """Whether a key may differ between a run and its resume."""
    key = f"{section}.{name}" if section else name
    level = level_of(key) or level_of(section)
    return {"free": " *May change.*", "say": " *May change, said.*"}.get(str(level), "")
