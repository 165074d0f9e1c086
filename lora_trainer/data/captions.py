"""The text beside an image."""

from __future__ import annotations

import re
from pathlib import Path

from lora_trainer.errors import Problem

MAX_CAPTION_BYTES = 100_000


def caption_file(image: Path, extension: str) -> Path:
    """Where the caption of an image is looked for: the same folder and name, another ending."""
    return image.with_suffix(extension)


def read_lines(file: Path) -> tuple[str, ...] | Problem:
    """The non-empty lines of a caption file, trimmed; a problem where it cannot be read as UTF-8 text."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        return Problem("the caption cannot be read", str(file), error.strerror, "check the file's permissions")
    if len(raw) > MAX_CAPTION_BYTES:
        return Problem(f"a caption of {len(raw):,} bytes", str(file), fix="is this really a caption?")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Problem("the caption is UTF-16", str(file), fix=f"iconv -f UTF-16 -t UTF-8 '{file.name}'")
    if b"\0" in raw:
        return Problem("the caption holds NUL bytes", str(file), f"byte {raw.index(0)}", "save it as plain UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Problem(
            "the caption is not UTF-8",
            str(file),
            f"byte {error.start} is 0x{raw[error.start]:02x}",
            f"iconv -f WINDOWS-1252 -t UTF-8 '{file.name}' (or save it as UTF-8)",
        )
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def caption_from_name(image: Path) -> str:
    """The words of the file's name; where that is only a number, of its folder's name without an `N_` before it."""
    words = _words(image.stem)
    return words if not words.isdigit() else _words(re.sub(r"^\d+_", "", image.parent.name)) or words


def _words(name: str) -> str:
    """Separators become spaces; a trailing number such as ` 12` or ` (2)` goes."""
    words = re.sub(r"[\s_\-]+", " ", name).strip()
    return re.sub(r"\s*\(?\d+\)?$", "", words).strip() or words
