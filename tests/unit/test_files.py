"""Atomic files, the lock, the log, and safetensors files of equal bytes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.errors import ExitCode, SystemSetupError
from lora_trainer.storage import atomic_files, locks, safetensors_io


class Cut(Exception):
    """The moment at which the test pulls the plug."""


def cut_at(number: int) -> atomic_files.Observer:
    """Raise at the `number`-th moment (0-based)."""
    seen = itertools.count()

    def cut(moment: str, _name: str, _path: Path) -> None:
        if next(seen) == number:
            raise Cut(moment)

    return cut


def test_a_cut_at_any_operation_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "file"
    operations: list[str] = []
    with atomic_files.observe_operations(lambda moment, name, _: operations.append(f"{moment} {name}")):
        atomic_files.write_file(target, b"old")
    assert operations.count("before rename") == 1
    for number in range(len(operations)):
        atomic_files.write_file(target, b"old")
        with pytest.raises(Cut), atomic_files.observe_operations(cut_at(number)):
            atomic_files.write_file(target, b"new")
        assert target.read_bytes() in (b"old", b"new")
        assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_files_are_synced_before_they_get_their_name(tmp_path: Path) -> None:
    order: list[str] = []
    with atomic_files.observe_operations(lambda moment, name, _: order.append(name) if moment == "after" else None):
        atomic_files.write_file(tmp_path / "file", b"x")
    assert order == ["sync", "write", "rename", "sync_folder"]


def test_the_log_is_cut_back_to_what_is_kept(tmp_path: Path) -> None:
    log = atomic_files.AppendLog(tmp_path / "log", keep_bytes=0)
    log.append("one")
    kept = log.sync()
    log.append("two")
    log.close()
    again = atomic_files.AppendLog(tmp_path / "log", keep_bytes=kept)
    again.append("three")
    again.close()
    assert (tmp_path / "log").read_text() == "one\nthree\n"


def test_json_is_canonical_and_refuses_nan() -> None:
    assert atomic_files.to_json({"b": 1, "a": 2}) == atomic_files.to_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_files.to_json({"a": float("nan")})


@pytest.mark.process
def test_one_writer_per_folder_and_a_killed_one_does_not_block(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from lora_trainer.storage import locks\n"
        "with locks.sole_writer(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(SystemSetupError, match=f"pid {holder.pid}") as caught,
            locks.sole_writer(tmp_path, print),
        ):
            pass
        assert caught.value.exit_code == ExitCode.ENVIRONMENT
    finally:
        holder.kill()
        holder.wait()
    with locks.sole_writer(tmp_path, print):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b.float": torch.randn(3, 4),
        "a.half": torch.randn(5).half(),
        "c.bf16": torch.randn(2, 2).bfloat16(),
        "d.int": torch.arange(7),
        "e.scalar": torch.tensor(2.5),
        "f.view": torch.randn(4, 6).t()[1:],
        "g.empty": torch.zeros(0, 3),
        "h.bool": torch.tensor([True, False]),
    }


def test_tensor_files_are_read_by_the_library_and_equal_byte_for_byte(tmp_path: Path) -> None:
    tensors = some_tensors()
    safetensors_io.save(tmp_path / "a.safetensors", tensors, {"z": "1", "a": "2", "m": "ö"})
    shuffled = dict(reversed(tensors.items()))
    safetensors_io.save(tmp_path / "b.safetensors", shuffled, {"m": "ö", "a": "2", "z": "1"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    theirs = load_file(tmp_path / "a.safetensors")
    ours, metadata = safetensors_io.load(tmp_path / "a.safetensors")
    assert theirs.keys() == tensors.keys() == ours.keys()
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours[name], tensor)
    assert metadata == {"z": "1", "a": "2", "m": "ö"}


def test_the_payload_hash_leaves_out_the_metadata(tmp_path: Path) -> None:
    import hashlib

    tensors = some_tensors()
    safetensors_io.save(tmp_path / "a.safetensors", tensors, {"x": "y"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + header])["__metadata__"] == {"x": "y"}
    assert hashlib.sha256(raw[8 + header :]).hexdigest() == safetensors_io.payload_sha256(tensors)
