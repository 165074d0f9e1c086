"""Room on the disk, asked for before it is needed, and a disk's refusals in words."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_trainer.errors import Problem, SystemSetupError, refused_memory

DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG})
"""What a full or failing disk answers."""
_RIGHTS = "let this user write there (chmod, chown, a mount that is not read-only), or choose another place"
_PLACE = "look after the disk or the mount, or choose another place"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    **dict.fromkeys((errno.EIO, errno.EFBIG, errno.ENOTDIR, errno.ENAMETOOLONG), _PLACE),
    **dict.fromkeys((errno.ESTALE, errno.EISDIR, errno.ELOOP), _PLACE),
    errno.EMFILE: "allow more open files: ulimit -n 4096",
}
"""What a disk answers, or a folder that cannot be written as it is, and what mends it: room, a right, another place."""


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where `folder` lies or will lie."""
    return shutil.disk_usage(_nearest(folder)).free


def is_same_disk(one: Path, other: Path) -> bool:
    """Whether what is written into both folders takes room from one disk."""
    return _nearest(one).stat().st_dev == _nearest(other).stat().st_dev


def _nearest(folder: Path) -> Path:
    """The folder, or what is there of those above it."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return place


def size_of(folder: Path) -> int:
    """Bytes in all files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_room(folder: Path, needed: int, purpose: str, key: str = "output_dir") -> None:
    """Refuse to go on where there is too little room in the folder of a setting.

    Raises:
        SystemSetupError: both numbers are named.
    """
    if (free := free_bytes(folder)) < needed:
        why, fix = f"{purpose} need {mib(needed)}, free are {mib(free)}", f"free some space, or set another {key}"
        raise SystemSetupError(Problem("the disk has too little room for this run", str(folder), why, fix))


def require_room(folder: Path, needed: int) -> None:
    """What a full disk would answer, asked before anything is written.

    Raises:
        OSError: ENOSPC, as the write itself would.
    """
    if (free := free_bytes(folder)) < needed:
        raise OSError(errno.ENOSPC, f"{mib(needed)} needed, {mib(free)} free", str(folder))


@contextmanager
def faults_in_words() -> Iterator[None]:
    """What disk, folders or memory refuse inside the block becomes an error for the user; other faults stay bugs.

    Raises:
        SystemSetupError: naming the place and the refusal.
    """
    try:
        yield
    except Exception as error:
        if (asked := refused_memory(error)) is not None:
            fix = "free memory that other programs hold, or ask for less; the same command goes on"
            raise SystemSetupError(Problem("out of memory", why=asked, fix=fix)) from error
        if not isinstance(error, OSError) or error.errno not in _REMEDIES:
            raise
        where = str(error.filename or "the run directory")
        fix = f"{_REMEDIES[error.errno]}; the same command goes on from the newest checkpoint"
        raise SystemSetupError(Problem("the disk refused", where, error.strerror, fix)) from error


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
