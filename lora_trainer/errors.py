"""What can go wrong outside our own code, told as what, where, why and how to mend, with documented exit codes.

A `TrainerError` carries every problem of its kind at once. The command line prints it without a traceback; any other
exception that reaches the top is a bug of ours.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NO_MEMORY = re.compile(
    r"(out of|not enough|can't allocate|cannot allocate) memory|_ALLOC_FAILED|failed to map segment"
    r"|could not create a primitive|error return without exception set",
    re.IGNORECASE,
)
"""As CUDA, torch, the loader of libraries, oneDNN and CPython say it."""
_TRIED = re.compile(r"(?:tried|unable) to allocate ([\d.,]+ \w+)", re.IGNORECASE)


def printable(text: str) -> str:
    """The text with escapes for what would steer a terminal instead of being shown."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def remedy_of_absence(path: str, key: str) -> str:
    """What to do about a path, the value of a setting, where nothing lies."""
    if "://" in path:
        return f"download it, and give its folder here: {key} is no address"
    if drive := re.match(r"([A-Za-z]):[\\/]*", path):
        place = f"/mnt/{drive[1].lower()}/{path[drive.end() :]}".replace("\\", "/")
        return f"that is a path of Windows; under WSL2 write {key}={place} (in quotes, as a shell takes \\ away)"
    return f"set {key}; relative paths start where you are"


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


def told_once(named: Iterable[tuple[str, Problem]], then: str) -> Iterator[Problem]:
    """Problems of trials: what is wrong with several of them is told once, after their names."""
    names: dict[Problem, dict[str, None]] = {}
    for name, problem in named:
        names.setdefault(problem, {})[name] = None
    for problem, whose in names.items():
        more = f", {len(whose) - 5} more" if len(whose) > 5 else ""
        yield replace(problem, what=f"{', '.join([*whose][:5])}{more}{then}{problem.what}")


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


def refused_memory(error: BaseException) -> str | None:
    """What an error says of memory that the device or the host refused; None where it is another fault."""
    if isinstance(error, TrainerError):
        return None
    text, is_sure = str(error), isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not (is_sure or _NO_MEMORY.search(text)):
        return None if error.__cause__ is None else refused_memory(error.__cause__)
    tried = _TRIED.search(text)
    return f"tried to allocate {tried[1]}" if tried else f"{type(error).__name__} {text.partition(chr(10))[0]}".strip()


class OutOfMemory(SystemSetupError):
    """Memory was refused; every update before is as it was.

    Args:
        phase: what the run was doing (`planning/saving.py`).
        why: what was asked for, the peak, and what is free.
    """

    def __init__(self, phase: str, why: str, fix: str | None = None) -> None:
        super().__init__(Problem(f"out of memory in the phase `{phase}`", why=why, fix=fix))
        self.phase, self.why = phase, why
        self.kept: str | None = None
        """Where the same command goes on."""
        self.trials_per_pass = 1


class NumericStop(TrainerError):
    """Training stopped because its numbers were no longer finite; the last good state is saved."""

    exit_code = ExitCode.NUMERIC
    title = "numeric stop"


class StoppedBySignal(TrainerError):
    """A signal asked for a stop; the state is saved and the same command resumes."""

    exit_code = ExitCode.STOPPED
    title = "stopped"
