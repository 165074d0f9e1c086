"""Files that matter are written aside, synced to the disk, then renamed: a reader sees the old file or the new one.

Every change of the disk goes through one of the primitives at the foot of this page. `observe_operations` sees each of
them before and after it happens, so that a test can count them and let the n-th one fail.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO

from lora_trainer.errors import Problem, SystemSetupError

TEMPORARY_PREFIX = ".tmp-"
UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""What a file system answers that lacks an operation: no fault of the disk."""
Observer = Callable[[str, str, Path], None]  # ("before" | "after", operation, path)
_observer: Observer | None = None


def write_file(path: Path, chunks: bytes | Iterable[bytes]) -> None:
    """Replace `path` by the bytes given, atomically and durably; its folder is made where missing."""
    make_folder(path.parent)
    aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        write_synced(aside, chunks)
        rename(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by the content as sorted, indented JSON, atomically and durably."""
    write_file(path, to_json(content))


def to_json(content: Any) -> bytes:
    """Canonical JSON bytes: sorted keys, two spaces, a final newline; NaN is refused."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path, max_bytes: int = 16 * 2**20) -> Any:
    """The content of a JSON file.

    Raises:
        OSError, ValueError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_regular(path, max_bytes))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_regular(path: Path, max_bytes: int = 64 * 2**20) -> bytes:
    """The content of a regular file of bounded size: no pipe can make us wait, no device fill the memory.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"the file is larger than {max_bytes:,} bytes")
    return content


def open_regular(path: Path) -> BufferedReader:
    """A regular file, opened to be read.

    Raises:
        OSError: it cannot be, or is something else.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL in its name
        raise OSError(errno.EINVAL, str(error)) from error
    if not stat.S_ISREG(mode):
        kind = IsADirectoryError if stat.S_ISDIR(mode) else OSError
        raise kind(errno.EINVAL, "it is no regular file", str(path))
    return path.open("rb")


def write_synced(path: Path, chunks: bytes | Iterable[bytes]) -> None:
    """Write a new file under its final name and sync it; for files inside a folder that is still aside."""
    with _observed("write", path), path.open("wb") as file:
        for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
            file.write(chunk)
        file.flush()
        _sync(file, path)


def remove_folder(folder: Path) -> None:
    """Delete a folder of ours; it is renamed first, so that a half-deleted one is never taken for a whole one."""
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}delete-{folder.name}-{os.getpid()}")
    rename(folder, doomed)
    with _observed("delete", folder):
        shutil.rmtree(doomed)


class AppendLog:
    """A file of lines that only grows, and that a resume cuts back to a known length.

    Lines that the disk refuses are kept in memory and written, in order, as soon as it takes them again.
    """

    def __init__(self, path: Path, *, keep_bytes: int) -> None:
        """Open `path` for appending, cut back to `keep_bytes` first (0 starts anew)."""
        make_folder(path.parent)
        self._path = path
        is_new = not path.exists()
        self._file = path.open("ab", buffering=0)
        if is_new:
            sync_folder(path.parent)
        self._length = self._file.tell()
        self._waiting: list[bytes] = []
        if self._length > keep_bytes:
            self._cut(keep_bytes)

    def append(self, line: str) -> None:
        """Add one line; it is in the kernel's hands when this returns, or waits for a disk that takes it."""
        self._waiting.append(line.encode() + b"\n")
        with suppress(OSError):
            self._write_waiting()

    def sync(self) -> int:
        """Bring the lines to the disk, as far as it takes them; the file's length in bytes with those that wait."""
        with suppress(OSError):
            self._write_waiting()
            _sync(self._file, self._path)
        return self._length + sum(map(len, self._waiting))

    def close(self) -> None:
        """Close the file; lines that still wait are tried once more.

        Raises:
            OSError: the disk refuses them, and they are lost.
        """
        try:
            self._write_waiting()
        finally:
            self._file.close()

    def _write_waiting(self) -> None:
        while self._waiting:
            line, written = self._waiting[0], 0
            try:
                with _observed("append", self._path):
                    while written < len(line):
                        written += self._file.write(line[written:])
            except OSError:
                if written:
                    self._cut(self._length)
                raise
            self._length += len(line)
            del self._waiting[0]

    def _cut(self, length: int) -> None:
        with _observed("truncate", self._path):
            self._file.truncate(length)
        self._length = length


def reserve_space(file: Path, num_bytes: int) -> None:
    """Make a file that takes up this many bytes of the disk; what it holds of an earlier time stays taken.

    So final files fit later, after `remove_file`, on a disk that others have filled.

    Raises:
        OSError: there is no such space; no file is left.
    """
    with _observed("reserve", file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # glibc's stand-in for fallocate reads, too
        try:
            _allocate(descriptor, num_bytes)
            _fsync(descriptor)  # where blocks are only promised, a full disk is told of here
        except OSError:
            file.unlink()
            raise
        finally:
            os.close(descriptor)


def _allocate(descriptor: int, num_bytes: int) -> None:
    """Take the blocks of a file of this length; by writing zeros where its file system cannot do it otherwise."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        written = 0
        while written < num_bytes:
            written += os.pwrite(descriptor, bytes(min(2**20, num_bytes - written)), written)


def remove_file(file: Path) -> None:
    """Delete a file of ours where it is there."""
    if file.exists():
        with _observed("delete", file):
            file.unlink()


def clear_temporaries(folder: Path) -> None:
    """Remove what a killed writer left aside in this folder."""
    for left_behind in sorted(folder.glob(f"{TEMPORARY_PREFIX}*")):
        if left_behind.is_dir():
            shutil.rmtree(left_behind)
        else:
            left_behind.unlink()


@contextmanager
def observe_operations(observer: Observer) -> Iterator[None]:
    """Let `observer` see every operation, before and after; what it raises is raised in the operation's place."""
    global _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, with synced names: a file is as durable as the names that lead to it.

    Raises:
        SystemSetupError: a file or a link that leads nowhere is in the way, or this place holds no folders.
    """
    if not folder.is_dir():
        if folder.is_symlink():
            fix = "mount or make what it leads to, or choose another place"
            raise SystemSetupError(Problem("a link leads nowhere", str(folder), f"to {folder.readlink()}", fix))
        make_folder(folder.parent)
        try:
            with _observed("mkdir", folder):
                folder.mkdir(exist_ok=True)
        except (FileExistsError, FileNotFoundError) as error:  # a file is in the way; /proc
            fix = "choose another place"
            raise SystemSetupError(Problem("no folder can be made here", str(folder), error.strerror, fix)) from error
        sync_folder(folder.parent)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder its final name; durable once the folder around it is synced."""
    with _observed("rename", target):
        try:
            source.replace(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.EPERM) or not target.is_file():
                raise
            target.unlink()  # sshfs and some more of FUSE replace nothing; for a moment there is no such file
            source.rename(target)


def sync_folder(folder: Path) -> None:
    """Bring the folder's names to the disk, where its file system can (CIFS and some of FUSE cannot)."""
    with _observed("sync_folder", folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync(file: BinaryIO | FileIO, path: Path) -> None:
    with _observed("sync", path):
        _fsync(file.fileno())


def _fsync(descriptor: int) -> None:
    """Sync, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


@contextmanager
def _observed(operation: str, path: Path) -> Iterator[None]:
    if _observer is not None:
        _observer("before", operation, path)
    yield
    if _observer is not None:
        _observer("after", operation, path)
