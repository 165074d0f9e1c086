"""What a start inherits: its screen, and variables through which others would decide for it. Imports nothing heavy."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class Screen(io.FileIO):
    """A screen that takes every word, and shows none where it cannot: its reader died, or the disk below it is full."""

    def write(self, text: Any) -> int:
        """Show what can be shown; the number of bytes taken."""
        try:
            written = super().write(text)
        except OSError:
            written = None
        return memoryview(text).nbytes if written is None else written


def settle() -> None:
    """Let neither the screen nor the environment end a command or decide what it does."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            _settle_stream(name, stream)
    for variable, value in {
        "TRANSFORMERS_VERBOSITY": "error",  # our own console says what happens
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DIFFUSERS_DISABLE_REMOTE_CODE": "1",  # no library may run code that a checkpoint brings along
    }.items():
        os.environ.setdefault(variable, value)
    os.environ["MPLBACKEND"] = "agg"  # notebooks export one of their own; pictures are files here


def _settle_stream(name: str, stream: io.TextIOWrapper) -> None:
    """The same stream on a `Screen`; a letter that it lacks has `?` in its place."""
    stream.flush()
    screen = io.TextIOWrapper(
        io.BufferedWriter(Screen(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering or stream.write_through,
    )
    setattr(sys, name, screen)
