"""The text of each image: read beside it, made from its name, and what of it is not used as it stands."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_trainer.config.schema import CaptionConfig
from lora_trainer.data.folders import (
    CAPTION_ENDINGS,
    LISTS,
    Layout,
    is_file,
    is_folder,
    number_before,
    some,
)
from lora_trainer.errors import Problem
from lora_trainer.models.family import Family
from lora_trainer.storage.atomic_files import read_regular

MAX_CAPTION_BYTES = 100_000
_PROMPT_SYNTAX = re.compile(r"\([^()]*:\s*\d+(\.\d+)?\s*\)|\{[^{}|]*\|[^{}]*\}|<(lora|lyco|hypernet|embedding):[^<>]*>")
_SHOWN_LETTERS = 80
Captioned = tuple[Path, str, tuple[str, ...]]
"""An image's file, its name and its captions."""


def captions_of(image: Path, config: CaptionConfig, layout: Layout) -> tuple[str, ...] | Problem:
    """What an image is trained on, or why there is nothing."""
    file = image.with_suffix(config.extension)
    if isinstance(lines := _caption_lines(file), Problem):
        return lines
    if lines:
        return lines if config.lines == "all" else lines[:1]
    if config.missing == "filename":
        return (_caption_from_name(image, layout),)
    if config.missing == "empty":
        return ("",)
    what = "the caption file is empty" if is_file(file) else "the image has no caption"
    fix = "write it, or set data.captions.missing to filename or empty"
    return Problem(what, str(image), f"looked for {file.name}{_elsewhere(image, file)}", fix)


def _elsewhere(image: Path, file: Path) -> str:
    """Where the caption may be instead."""
    usual = (image.with_suffix(ending) for ending in CAPTION_ENDINGS if ending != file.suffix)
    if other := next((other for other in usual if is_file(other)), None):
        return f"; {other.name} is there: set data.captions.extension: {other.suffix}"
    forms = [unicodedata.normalize(form, file.name) for form in ("NFC", "NFD")]
    names = [f"{image.name}{file.suffix}", f"{image.stem}{file.suffix.upper()}", f"{image.stem}.json", *forms, *LISTS]
    there = next((name for name in names if name != file.name and is_file(file.with_name(name))), None)
    return f"; {there} is there, which is not read" if there else ""


def _caption_lines(file: Path) -> tuple[str, ...] | Problem:
    """The non-empty lines of a caption file, trimmed; a problem where it cannot be read as UTF-8 text."""
    if not os.path.lexists(file) or is_folder(file):
        return ()
    try:
        raw = read_regular(file, MAX_CAPTION_BYTES)
    except OSError as error:
        fix = "make it a text file that you may read"
        return Problem("the caption cannot be read", str(file), error.strerror, fix)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Problem("the caption is UTF-16", str(file), fix=_as_utf8("UTF-16", file))
    if b"\0" in raw:
        return Problem("the caption holds NUL bytes", str(file), f"byte {raw.index(0)}", "save it as plain UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is 0x{raw[error.start]:02x}"
        return Problem("the caption is not UTF-8", str(file), why, _as_utf8("WINDOWS-1252", file))
    return tuple(line.strip() for line in re.split(r"[\r\n]+", text) if line.strip())


def _as_utf8(encoding: str, file: Path) -> str:
    """What a shell does with a caption in another encoding."""
    old, new = shlex.quote(str(file)), shlex.quote(f"{file}.utf-8")
    return f"save it as UTF-8, as by: iconv -f {encoding} -t UTF-8 {old} > {new} && mv {new} {old}"


def _caption_from_name(image: Path, layout: Layout) -> str:
    """The words of a folder `N_words`, as in kohya; else of the file's name, of its folder's if that is a number."""
    words, folder = _words(image.stem), image.parent.name
    if words.isdigit() or (layout != "flat" and number_before(folder) is not None):
        return _words(re.sub(r"^\d+_", "", folder)) or words
    return words


def _words(name: str) -> str:
    """Separators become spaces; a trailing number such as ` 12` or ` (2)` goes."""
    words = re.sub(r"[\s_\-]+", " ", name).strip()
    return re.sub(r"\s*\(?\d+\)?$", "", words).strip() or words


def quoted(text: str) -> str:
    """The beginning of a text, as it stands."""
    return f"`{text[:_SHOWN_LETTERS]}{'...' if len(text) > _SHOWN_LETTERS else ''}`"


def caption_notes(images: Iterable[Captioned], config: CaptionConfig) -> Iterator[str]:
    """Where the captions come from, what names were made into, and what of the files is not read or means nothing."""
    files = [(path.with_suffix(config.extension), name, captions) for path, name, captions in images]
    without = [(name, captions) for file, name, captions in files if not is_file(file)]
    rest = f"; {len(without)} by policy `{config.missing}`" if without else ""
    yield f"captions: {len(files) - len(without)} of {len(files)} from {config.extension} files{rest}"
    if config.missing == "filename" and without:
        yield f"captions from names: {some([f'{name} `{captions[0]}`' for name, captions in without])}"
    if config.lines == "first":
        lines = ((name, _caption_lines(file)) for file, name, _ in files)
        if longer := [name for name, read in lines if isinstance(read, tuple) and len(read) > 1]:
            rest = "of which only the first is used; data.captions.lines: all takes each as a variant"
            yield f"{len(longer)} captions have several lines, {rest}: {some(longer)}"
    found = ((name, _PROMPT_SYNTAX.search(caption)) for _, name, captions in files for caption in captions)
    if literal := [f"{name} {quoted(match[0])}" for name, match in found if match]:
        yield f"{len(literal)} captions hold prompt syntax, which is trained on letter for letter: {some(literal)}"


def long_captions(family: Family, images: Iterable[Captioned]) -> tuple[list[Problem], list[str]]:
    """The captions that are longer than the text encoder reads: as refusals, and what of each is lost where it is cut.

    Both in the same order.
    """
    limit, fix = family.max_tokens, "shorten it, or set data.captions.too_long: cut"
    problems, lost = [], []
    for path, name, captions in images:
        for caption in captions:
            if (num := family.count_tokens(caption)) > limit:
                what = f"the caption has {num - 2} tokens, the text encoder reads {limit - 2}"
                problems.append(Problem(what, str(path), fix=fix))
                lost.append(f"{name} loses {quoted(caption[len(family.readable(caption)) :].strip())}")
    return problems, lost
