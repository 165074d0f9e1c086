"""One writer of a folder at a time, by what its file system has: the kernel's lock, or a lease."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import psutil

from lora_trainer.errors import Problem, SystemSetupError
from lora_trainer.storage.atomic_files import TEMPORARY_PREFIX, UNSUPPORTED, make_folder

LEASE_S = 60.0
"""An owner's lease ends so long after its last touch."""


@contextmanager
def sole_writer(folder: Path, emit: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock: one writer at a time. The kernel frees it when the process dies, however it dies.

    Where the file system has no locks a lease stands in: the owner's name in the file, which is touched all the time.

    Args:
        emit: shows a line to a person.

    Raises:
        SystemSetupError: another process holds it; its pid and host are named, and how long ago it was heard of.
    """
    make_folder(folder)
    path = folder / ".lock"
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):  # a link's target is somebody's
        raise SystemSetupError(Problem("what is no file stands where the lock does", str(path), fix="take it out"))
    with path.open("a+", errors="replace") as file:
        try:
            is_locked, is_held = _lock(file), False
        except BlockingIOError:
            is_locked = is_held = True
        with nullcontext() if is_locked else _alone(path.with_name(f"{TEMPORARY_PREFIX}claim")):
            file.seek(0)
            owner = file.read(1000).strip()
            if is_held or not (is_locked or _is_gone(owner) or _age(path) >= LEASE_S):
                heard = f"{'taken' if is_locked else 'renewed'} {timedelta(seconds=round(_age(path)))} h ago"
                why = f"its lock is held by {owner or 'an unknown process'}, {heard}"
                fix = f"wait for it, stop it, or give this run another `name`; if it is gone for sure, delete {path}"
                raise SystemSetupError(Problem("another process is writing this run", str(folder), why, fix))
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {_here()}")
            file.flush()
        if not is_locked:
            emit(f"{folder} cannot be locked on this file system: a lease stands in, the time of {path}")
        try:
            with nullcontext() if is_locked else _lease(path):
                yield
        finally:
            file.truncate(0)


@contextmanager
def _alone(claim: Path) -> Iterator[None]:
    """Be the only process inside the block, for a moment, where there are no locks; what a kill left counts for 5 s."""
    while True:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            time.sleep(0.1)
            with suppress(FileNotFoundError):
                if _age(claim) > 5:
                    claim.unlink()
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


@contextmanager
def _lease(path: Path) -> Iterator[None]:
    """Touch a file all through the block."""
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(LEASE_S / 6):
            with suppress(OSError):
                os.utime(path)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _age(path: Path) -> float:
    """Seconds since a file was written or touched, by the clock of its file system."""
    clock = path.with_name(f"{TEMPORARY_PREFIX}clock-{os.getpid()}")
    try:
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink()
    except OSError:  # a full disk
        now = time.time()
    return max(0.0, now - path.stat().st_mtime)


def _here() -> str:
    """This host; in a container, where process ids mean others, with the container's mark."""
    return f"{socket.gethostname()} ({Path('/proc/self/ns/pid').readlink()})"


def _is_gone(owner: str) -> bool:
    """Whether nobody holds the lease, or a process of this host that has ended."""
    pid, _, host = owner.removeprefix("pid ").partition(" on ")
    return not owner or (host == _here() and pid.isdecimal() and not psutil.pid_exists(int(pid)))


def _lock(file: TextIO) -> bool:
    """Lock a file for this process; False where its file system has neither kind of lock.

    Raises:
        BlockingIOError: another process holds it.
    """
    for lock in (fcntl.flock, fcntl.lockf):  # Lustre and NFS may have the second alone
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
                raise
    return False
