"""What can go wrong outside our own code, told as what, where, why and how to mend, with documented exit codes.

A `TrainerError` carries every problem of its kind at once. The command line prints it without a traceback; any other
exception that reaches the top is a bug of ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of `lora-trainer` and `python train.py`; `exit.json` in the run directory holds the same number."""

    DONE = 0
    BUG = 1
    CONFIG = 2
    DATA = 3
    MODEL = 4
    ENVIRONMENT = 5
    NUMERIC = 6
    FAULT_FOUND = 7
    STOPPED = 75


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with escapes for what would steer a terminal instead of being shown."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `where` is file:line, a key or a path; `fix` says what to write or do."""

    what: str
    where: str | None = None
    why: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.why:
            lines.append(f"    why: {self.why}")
        if self.fix:
            lines.append(f"    fix: {self.fix}")
        return printable("\n".join(lines))


class TrainerError(Exception):
    """A fault that the user can mend; holds all problems of one kind."""

    exit_code: ClassVar[ExitCode] = ExitCode.BUG
    title: ClassVar[str] = "error"

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(Problem(p) if isinstance(p, str) else p for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class ConfigError(TrainerError):
    """The configuration or the command line says something that cannot be done."""

    exit_code = ExitCode.CONFIG
    title = "config error"


class DataError(TrainerError):
    """Images or captions that cannot be used as they are."""

    exit_code = ExitCode.DATA
    title = "data error"


class ModelError(TrainerError):
    """A base checkpoint or LoRA file that cannot be used as it is."""

    exit_code = ExitCode.MODEL
    title = "model error"


class SystemSetupError(TrainerError):
    """The machine, the launcher, the disk or a missing package stands in the way."""

    exit_code = ExitCode.ENVIRONMENT
    title = "environment error"


class NumericStop(TrainerError):
    """Training stopped because its numbers were no longer finite; the last good state is saved."""

    exit_code = ExitCode.NUMERIC
    title = "numeric stop"


class StoppedBySignal(TrainerError):
    """A signal asked for a stop; the state is saved and the same command resumes."""

    exit_code = ExitCode.STOPPED
    title = "stopped"
