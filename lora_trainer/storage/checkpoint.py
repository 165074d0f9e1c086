"""What a resume needs, written so that a kill at any moment leaves the last whole checkpoint in place.

A checkpoint is a folder `step-00001234`: tensors in safetensors, the rest in JSON, and `manifest.json` with the size
and sha256 of every file, written last. It is made aside, synced, renamed, read back and verified; only then are older
ones removed. There is no pickle anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_trainer.errors import NumericStop, Problem, SystemSetupError
from lora_trainer.storage import atomic_files, disk_space, safetensors_io
from lora_trainer.storage.atomic_files import open_regular, read_json

FORMAT = 2
READABLE = (1, 2)
_FOLDER = re.compile(r"step-\d{8}")
_REPLACED = ".replaced"  # the earlier checkpoint of a step while its new one takes the name
_OVERHEAD = 2**20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on the disk."""

    folder: Path
    state: dict[str, Any]
    """The JSON values, `format` among them."""

    def tensors(self) -> dict[str, safetensors_io.Tensors]:
        """All tensors by part and name, as they were given to `save_checkpoint`; files of others are passed over."""
        names = sorted(read_json(self.folder / "manifest.json")["files"])
        files = [self.folder / name for name in names if name.endswith(".safetensors")]
        return {file.stem: safetensors_io.load(file)[0] for file in files}


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, safetensors_io.Tensors], state: Mapping[str, Any]
) -> Path:
    """Write, publish and verify a checkpoint under `folder`; all earlier ones stay (`prune` removes them).

    Args:
        tensors: by part (`adapter`, `optimizer`, `average`) and name.
        state: JSON values that belong to the tensors.

    Raises:
        NumericStop: a tensor holds numbers that are not finite; nothing is written.
        OSError: the disk has no room, refused a write, or gave back other bytes than were written (EIO).
    """
    all_tensors = {f"{part}: {name}": tensor for part, named in tensors.items() for name, tensor in named.items()}
    _require_finite(all_tensors)
    disk_space.require_room(folder, sum(tensor.nbytes for tensor in all_tensors.values()) + _OVERHEAD)
    final = folder / f"step-{step:08d}"
    aside = folder / f"{atomic_files.TEMPORARY_PREFIX}{final.name}-{os.getpid()}"
    try:
        atomic_files.make_folder(aside)
        files = {f"{part}.safetensors": safetensors_io.encode(named) for part, named in tensors.items()}
        contents = {"state.json": [atomic_files.to_json({**state, "format": FORMAT})], **files}
        written = {name: _write(aside / name, chunks) for name, chunks in contents.items()}
        manifest = {"format": FORMAT, "files": written, "sha256": _digest_of(written)}
        atomic_files.write_synced(aside / "manifest.json", atomic_files.to_json(manifest))
        _publish(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def prune(folder: Path, keep_last: int) -> None:
    """Remove all checkpoints but the newest `keep_last`.

    Raises:
        OSError: one could not be removed; those kept are whole.
    """
    for old in _by_step(folder)[:-keep_last]:
        atomic_files.remove_folder(old)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what was wrong with newer ones, which are set aside as `*.corrupt`.

    Raises:
        SystemSetupError: there are or were checkpoints, but none of them verifies: never a silent fresh start. Or one
            cannot be read now, or a newer version wrote it: then nothing is touched.
    """
    atomic_files.clear_temporaries(folder)
    faults: list[str] = []
    with _unreadable_in_words():
        _finish_replacements(folder)
        for candidate in reversed(_by_step(folder)):
            if (fault := _fault(candidate)) is None:
                return Checkpoint(candidate, read_json(candidate / "state.json")), faults
            faults.append(f"{candidate.name} is damaged ({fault}) and was set aside")
            _quarantine(candidate)
    if damaged := sorted(c.name for c in folder.glob("step-*.corrupt*")):
        why = "; ".join(faults) or f"all were damaged and set aside: {', '.join(damaged)}"
        fix = "restore one from a backup, or start anew with --fresh (the old run is kept beside it)"
        raise SystemSetupError(Problem("no checkpoint of this run can be read", str(folder), why, fix))
    return None, []


def open_checkpoint(folder: Path, step: int | None) -> Checkpoint:
    """A verified checkpoint to read from: that of `step`, or the newest. Nothing is changed on the disk.

    Raises:
        SystemSetupError: there is none, it is damaged, or it cannot be read.
    """
    with _unreadable_in_words():
        kept = {int(entry.name.removeprefix("step-")): entry for entry in _by_step(folder)}
        if not kept or step not in (None, *kept):
            why = f"steps kept: {', '.join(map(str, kept)) or 'none'}"
            raise SystemSetupError(Problem(f"no checkpoint of step {step or '(any)'}", str(folder), why))
        chosen = kept[max(kept) if step is None else step]
        if (fault := _fault(chosen)) is not None:
            raise SystemSetupError(Problem("the checkpoint is damaged", str(chosen), fault, "name another step"))
        return Checkpoint(chosen, read_json(chosen / "state.json"))


def _by_step(folder: Path) -> list[Path]:
    """The published checkpoints in a folder, oldest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in entries if _FOLDER.fullmatch(entry.name))


@contextmanager
def _unreadable_in_words() -> Iterator[None]:
    """A disk or share that does not answer now says nothing about what it holds."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or "checkpoints")
        fix = "try again once the disk answers; if it never will, move that checkpoint away to go on from an older"
        raise SystemSetupError(Problem("a checkpoint cannot be read now", where, error.strerror, fix)) from error


def _write(file: Path, chunks: Iterable[bytes]) -> dict[str, Any]:
    """Write a file that is still aside; its row in the manifest."""
    digest, size = hashlib.sha256(), 0

    def counted() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    atomic_files.write_synced(file, counted())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _digest_of(files: Mapping[str, Any]) -> str:
    """sha256 of the manifest's list, so that an entry cannot vanish from it."""
    return hashlib.sha256(atomic_files.to_json(dict(files))).hexdigest()


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if every file is what its manifest says.

    Raises:
        SystemSetupError: a newer version of this program wrote it.
        OSError: it cannot be read now.
    """
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest["format"] not in READABLE:
            if read_json(folder / "state.json")["format"] == manifest["format"]:
                what = f"the checkpoint has format {manifest['format']}, and this version reads up to {FORMAT}"
                why = "a newer lora_trainer wrote it; nothing was changed"
                fix = "install the newer version again, or give the new run another `name`"
                raise SystemSetupError(Problem(what, str(folder), why, fix))
            return f"format {manifest['format']} is none that was ever written"
        if manifest["sha256"] != _digest_of(manifest["files"]):
            return "manifest.json is not what was written"
        for name, expected in manifest["files"].items():
            with open_regular(folder / name) as file:
                if os.fstat(file.fileno()).st_size != expected["bytes"]:
                    return f"{name} has the wrong size"
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} has other content than was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def _publish(aside: Path, final: Path) -> None:
    """Give a checkpoint its name and read it back; one that had the name stays until then under another."""
    earlier = final.with_name(final.name + _REPLACED)
    if final.exists():
        atomic_files.rename(final, earlier)
    atomic_files.sync_folder(aside)
    atomic_files.rename(aside, final)
    atomic_files.sync_folder(final.parent)
    if (fault := _fault(final)) is not None:
        _quarantine(final)
        raise OSError(errno.EIO, f"what was written could not be read back: {fault}", str(final))
    if earlier.exists():
        atomic_files.remove_folder(earlier)


def _finish_replacements(folder: Path) -> None:
    """Of two checkpoints of one step, which a kill left side by side, keep the new one if it is whole, else the old."""
    for earlier in sorted(folder.glob(f"step-*{_REPLACED}")):
        final = earlier.with_name(earlier.name.removesuffix(_REPLACED))
        if final.exists() and _fault(final) is not None:
            _quarantine(final)
        if final.exists():
            atomic_files.remove_folder(earlier)
        else:
            atomic_files.rename(earlier, final)


def _require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if faulty := [name for name, tensor in numbers.items() if not torch.isfinite(tensor).all()]:
        what = f"{len(faulty)} tensors of the training state are not finite and are never saved"
        where = ", ".join(faulty[:3]) + (" ..." if len(faulty) > 3 else "")
        fix = "lower optimizer.lr; the same command goes on from the last checkpoint, which is whole"
        raise NumericStop(Problem(what, where, "training diverged", fix))


def _quarantine(folder: Path) -> None:
    target, number = folder.with_name(f"{folder.name}.corrupt"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.corrupt-{number}")
    atomic_files.rename(folder, target)
