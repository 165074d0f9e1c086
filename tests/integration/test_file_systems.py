"""Disks that lack an operation: no fallocate, no flock, no sync of a folder. Runs start there and end as elsewhere."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_trainer.errors import SystemSetupError
from lora_trainer.storage import atomic_files, locks

Train = Callable[..., Path]
NO_LOCK = "cannot be locked on this file system"


FORMATS = {"ext2": ["mkfs.ext2", "-q", "-m", "0"], "exfat": ["mkfs.exfat"]}
MOUNTS = {"ext2": ["mount"], "exfat": ["mount.exfat-fuse"]}


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """A real file system of 24 MiB: ext2 has no fallocate, exFAT in user space keeps no modes and no links."""
    image, place = folder / "disk", folder / kind
    with image.open("wb") as file:
        file.truncate(24 * 2**20)
    place.mkdir()
    _system([*FORMATS[kind], str(image)])
    with ExitStack() as stack:
        device = _system(["losetup", "--find", "--show", str(image)]).strip()
        stack.callback(_system, ["losetup", "--detach", device])
        _system([*MOUNTS[kind], device, str(place)])
        stack.callback(_system, ["umount", str(place)])
        yield place


def _system(command: list[str]) -> str:
    """What a command of the system says; the test is skipped where there is none, or it is refused."""
    found = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"no {command[0]} here")
    done = subprocess.run([found, *command[1:]], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{command[0]} is refused here: {done.stderr.strip()[:200]}")
    return done.stdout


@pytest.fixture
def ext2(tmp_path: Path) -> Iterator[Path]:
    with mounted("ext2", tmp_path) as place:
        yield place


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, int], None]:
    """Let a function of the system answer with an error."""

    def patch(module: Any, name: str, error: int) -> None:
        def refused(*_: object) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(module, name, refused)

    return patch


@pytest.fixture
def refuse_folder_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    honest = os.fsync

    def patch(error: int) -> None:
        def fsync(descriptor: Any) -> None:
            if stat.S_ISDIR(os.stat(descriptor).st_mode):
                raise OSError(error, os.strerror(error))
            honest(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return patch


@pytest.mark.process
@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_on_another_file_system_is_the_run_elsewhere(train_toy: Train, tmp_path: Path, kind: str) -> None:
    straight = train_toy("checkpoint.every_steps=2")
    with mounted(kind, tmp_path) as place:
        train_toy(f"output_dir={place}", "checkpoint.every_steps=2")
        assert (place / "toy" / "toy.safetensors").read_bytes() == (straight / "toy.safetensors").read_bytes()


@pytest.mark.process
@pytest.mark.parametrize("has_stand_in", [True, False])
def test_space_on_ext2_is_taken_or_refused(
    refuse: Callable[[Any, str, int], None], ext2: Path, has_stand_in: bool
) -> None:
    if not has_stand_in:  # a C library that does not write the blocks itself
        refuse(os, "posix_fallocate", errno.EOPNOTSUPP)
    free = shutil.disk_usage(ext2).free
    for _ in range(2):  # a resume takes over what is there
        atomic_files.reserve_space(ext2 / "kept", 2**20)
        assert shutil.disk_usage(ext2).free <= free - 2**20
    with pytest.raises(OSError, match="No space left"):
        atomic_files.reserve_space(ext2 / "more", free)
    assert [file.name for file in ext2.iterdir() if file.is_file()] == ["kept"]


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_zeros_take_the_space_where_it_cannot_be_reserved(
    refuse: Callable[[Any, str, int], None], tmp_path: Path, error: int
) -> None:
    refuse(os, "posix_fallocate", error)
    atomic_files.reserve_space(tmp_path / "kept", 2**20 + 5)
    found = (tmp_path / "kept").stat()
    assert (found.st_size, found.st_blocks * 512 >= 2**20) == (2**20 + 5, True)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_refused_also_when_zeros_are_written(
    refuse: Callable[[Any, str, int], None], tmp_path: Path, error: int
) -> None:
    refuse(os, "posix_fallocate", errno.EOPNOTSUPP)
    refuse(os, "pwrite", error)
    with pytest.raises(OSError, match=os.strerror(error)):
        atomic_files.reserve_space(tmp_path / "kept", 2**20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
@pytest.mark.process
def test_without_flock_another_lock_holds_the_folder(
    refuse: Callable[[Any, str, int], None], capsys: pytest.CaptureFixture[str], tmp_path: Path, error: int
) -> None:
    refuse(fcntl, "flock", error)
    hold = (
        "import fcntl, sys, time; from pathlib import Path; from lora_trainer.storage import locks\n"
        f"def flock(*_): raise OSError({error}, 'no flock')\n"
        "fcntl.flock = flock\n"
        "with locks.sole_writer(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SystemSetupError, match=f"pid {holder.pid}"), locks.sole_writer(tmp_path, print):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locks.sole_writer(tmp_path, print):
        assert NO_LOCK not in capsys.readouterr().out


def test_without_any_lock_a_run_says_so_once_and_goes_on(
    refuse: Callable[[Any, str, int], None], train_toy: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(fcntl, "flock", errno.ENOSYS)
    refuse(fcntl, "lockf", errno.ENOLCK)
    run_dir = train_toy()
    assert (run_dir / "toy.safetensors").is_file()
    assert capsys.readouterr().out.count(f"{run_dir} {NO_LOCK}") == 1


@pytest.fixture
def without_locks(refuse: Callable[[Any, str, int], None]) -> None:
    refuse(fcntl, "flock", errno.ENOSYS)
    refuse(fcntl, "lockf", errno.ENOLCK)


def try_lock(folder: Path) -> None:
    with locks.sole_writer(folder, lambda line: None):
        pass


def test_without_locks_a_lease_keeps_others_out(
    without_locks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(locks, "LEASE_S", 0.3)
        with locks.sole_writer(tmp_path, lambda line: None):
            time.sleep(0.5)  # longer than a lease: it is renewed
            with pytest.raises(SystemSetupError, match=rf"pid {os.getpid()} on .*renewed 0:00:00 h ago"):
                try_lock(tmp_path)
    try_lock(tmp_path)


@pytest.mark.parametrize("owner", [f"pid {2**22 + 1} on {locks._here()}", "pid 7 on node9 (pid:[1])", "", "?"])
def test_a_lease_that_a_kill_left_ends(without_locks: None, tmp_path: Path, owner: str) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(owner)
    if "node9" in owner or owner == "?":  # of another host: named with its age, and it ends by itself
        with pytest.raises(SystemSetupError, match=r"renewed 0:00:0. h ago") as caught:
            try_lock(tmp_path)
        assert owner in str(caught.value)
        os.utime(lock, (0, time.time() - locks.LEASE_S - 1))
    try_lock(tmp_path)


@pytest.mark.process
def test_without_locks_only_one_of_many_that_start_at_once_writes(
    without_locks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = locks._is_gone
    monkeypatch.setattr(locks, "_is_gone", lambda owner: (time.sleep(0.05), honest(owner))[1])  # others look meanwhile
    (tmp_path / f"{atomic_files.TEMPORARY_PREFIX}claim").touch()  # that of a process killed while it looked
    os.utime(tmp_path / f"{atomic_files.TEMPORARY_PREFIX}claim", (0, time.time() - 60))
    children, start = [], time.time() + 0.3
    for _ in range(8):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                time.sleep(max(0.0, start - time.time()))
                with locks.sole_writer(tmp_path, lambda line: None):
                    time.sleep(3)
                    code = 0
            except SystemSetupError:
                code = 5
            finally:
                os._exit(code)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, *[5] * 7]


def test_a_lock_that_the_server_of_a_dead_host_keeps(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with lock.open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("pid 7 on node9")
        held.flush()
        os.utime(lock, (0, time.time() - 7200))
        with pytest.raises(SystemSetupError, match=f"pid 7 on node9, taken 2:00:0. h ago(.|\n)*delete {lock}"):
            try_lock(tmp_path)
        lock.unlink()  # as the message says
        try_lock(tmp_path)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_run_where_folders_cannot_be_synced(
    refuse_folder_sync: Callable[[int], None], train_toy: Train, error: int
) -> None:
    refuse_folder_sync(error)
    assert (train_toy("checkpoint.every_steps=2") / "toy.safetensors").is_file()


@pytest.mark.parametrize("error", [errno.EEXIST, errno.EPERM])
def test_a_run_where_a_rename_replaces_nothing(train_toy: Train, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    straight = train_toy("checkpoint.every_steps=2", name="straight")
    honest = Path.replace

    def replace(source: Path, target: Path) -> Path:
        if Path(target).exists():
            raise OSError(error, os.strerror(error), str(source), None, str(target))
        return honest(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    run_dir = train_toy("checkpoint.every_steps=2")
    assert sorted(file.name for file in run_dir.iterdir()) == sorted(
        file.name.replace("straight", "toy") for file in straight.iterdir()
    )


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EINVAL])
def test_a_run_where_nothing_can_be_synced_nor_touched(
    refuse: Callable[[Any, str, int], None], train_toy: Train, error: int
) -> None:
    refuse(os, "fsync", error)
    for name in ("utime", "chmod", "link"):
        refuse(os, name, errno.EPERM)
    assert (train_toy("checkpoint.every_steps=2") / "toy.safetensors").is_file()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_folder_whose_sync_fails_is_a_fault(
    refuse_folder_sync: Callable[[int], None], tmp_path: Path, error: int
) -> None:
    refuse_folder_sync(error)
    with pytest.raises(OSError, match=os.strerror(error)):
        atomic_files.write_file(tmp_path / "file", b"x")


@pytest.mark.parametrize("error", [errno.EIO, errno.EBADF])
def test_a_lock_that_fails_for_another_reason_is_a_fault(
    refuse: Callable[[Any, str, int], None], tmp_path: Path, error: int
) -> None:
    refuse(fcntl, "flock", error)
    with pytest.raises(OSError, match=os.strerror(error)), locks.sole_writer(tmp_path, print):
        pass


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("place", ["out", "runs/.cache"])
def test_a_link_that_leads_nowhere(
    toy_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, command: str
) -> None:
    from lora_trainer.cli.program import main

    link = tmp_path / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to("/unmounted/disk")
    with pytest.raises(SystemExit, match="5"):
        main([command, "-c", str(toy_config), f"output_dir={link.parent if '.cache' in place else link}"])
    assert f"{link}: a link leads nowhere\n      why: to /unmounted/disk" in capsys.readouterr().err
    link.unlink()  # as the message says
    link.mkdir()
    main_check = ["check", "-c", str(toy_config), f"output_dir={link.parent if '.cache' in place else link}"]
    with pytest.raises(SystemExit, match="0"):
        main(main_check)


def test_a_place_that_holds_no_folders(toy_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_trainer.cli.program import main

    with pytest.raises(SystemExit, match="5"):
        main(["check", "-c", str(toy_config), "output_dir=/proc/none"])
    assert "/proc: nothing can be written here" in capsys.readouterr().err


def test_a_lock_is_never_somebodys_file(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(SystemSetupError, match="stands where the lock does"),
        locks.sole_writer(tmp_path / "run", print),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
