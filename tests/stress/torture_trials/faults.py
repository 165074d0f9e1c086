"""What goes wrong at the n-th operation on the disk: observers for `atomic_files.observe_operations`."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from stress.torture_trials.world import Prepare

from lora_trainer.storage import atomic_files

_installed = contextlib.ExitStack()
FREEING = ("delete", ".reserve")
Moment = tuple[str, str, str]  # ("before" | "after", operation, file name)


def moments(run: Callable[[], None]) -> list[Moment]:
    """Every moment before and after an operation of a run in this process."""
    seen: list[Moment] = []
    with atomic_files.observe_operations(lambda moment, operation, path: seen.append((moment, operation, path.name))):
        run()
    return seen


def install(observer: atomic_files.Observer) -> None:
    """Let an observer see all operations of the rest of a forked process."""
    _installed.enter_context(atomic_files.observe_operations(observer))


def kill_at(number: int) -> Prepare:
    """SIGKILL at the moment of this number (0-based)."""
    seen = 0

    def observe(_moment: str, _operation: str, _path: Path) -> None:
        nonlocal seen
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    return lambda: install(observe)


def frees(operation: str, name: str) -> bool:
    """Whether an operation takes no space but gives some back."""
    return operation == "delete" or (operation == "rename" and name.startswith(".tmp-delete"))


def refuse(number: int, error: int, *, until_space_is_freed: bool, happened: Path) -> Prepare:
    """The operation of this number (0-based) fails; and all after it, until the run frees the space it reserved.

    Args:
        happened: a file that is made when the first operation is refused.
    """
    seen, healed = 0, False

    def observe(moment: str, operation: str, path: Path) -> None:
        nonlocal seen, healed
        if moment == "after":
            healed = healed or (seen > number and (operation, path.name) == FREEING)
            return
        due = not healed and seen >= number if until_space_is_freed else seen == number
        seen += 1
        if due and not (until_space_is_freed and frees(operation, path.name)):
            happened.touch()
            raise OSError(error, os.strerror(error), str(path))

    return lambda: install(observe)
