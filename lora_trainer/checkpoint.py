"""What a resume needs, written so that a kill at any moment leaves the last whole checkpoint in place.

A checkpoint is a folder `step-00001234`: tensors in safetensors, the rest in JSON, and `manifest.json` with the size
and sha256 of every file, written last. It is made aside, synced, renamed, read back and verified; only then are older
ones removed. There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer import atomicio, tensor_file
from lora_trainer.errors import HostError, Problem

FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class Progress:
    """Counters of a run: `step` completed updates, `attempt` tried ones, and the length of its log."""

    step: int = 0
    attempt: int = 0
    metrics_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on the disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress(**self.state["progress"])

    @property
    def identity(self) -> dict[str, Any]:
        return self.state["identity"]

    def parts(self) -> dict[str, tensor_file.Tensors]:
        """All tensors by part and name, as they were given to `save_checkpoint`."""
        return {file.stem: tensor_file.load(file)[0] for file in sorted(self.folder.glob("*.safetensors"))}


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parts: Mapping[str, tensor_file.Tensors],
    *,
    plain: Mapping[str, Any],
    identity: Mapping[str, Any],
    scaler: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write, verify and publish a checkpoint under `folder`, then remove all but the newest `keep_last`.

    Args:
        parts: tensors by part (`adapter`, `optimizer`, `average`) and name.
        plain: JSON values that belong to the tensors.

    Raises:
        HostError: what was read back is not what was written.
    """
    atomicio.make_folder(folder)
    final = folder / f"step-{progress.step:08d}"
    aside = folder / f"{atomicio.TEMPORARY_PREFIX}{final.name}-{os.getpid()}"
    atomicio.make_folder(aside)
    state = {
        "format": FORMAT,
        "progress": {
            "step": progress.step,
            "attempt": progress.attempt,
            "metrics_bytes": progress.metrics_bytes,
        },
        "identity": dict(identity),
        "plain": dict(plain),
        "scaler": dict(scaler),
    }
    written = {"state.json": _write(aside / "state.json", [atomicio.to_json(state)])}
    for part, tensors in parts.items():
        written[f"{part}.safetensors"] = _write(aside / f"{part}.safetensors", tensor_file.encode(tensors))
    atomicio.write_synced(aside / "manifest.json", atomicio.to_json({"format": FORMAT, "files": written}))
    if final.exists():
        atomicio.remove_folder(final)
    atomicio.publish_folder(aside, final)
    if (fault := _fault(final)) is not None:
        raise HostError(Problem("a checkpoint could not be read back", str(final), fault, "check the disk"))
    _prune(folder, keep_last)
    return final


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what was wrong with newer ones, which are set aside as `*.corrupt`.

    Raises:
        HostError: there are checkpoints, but none of them verifies: never a silent fresh start.
    """
    if not folder.is_dir():
        return None, []
    atomicio.clear_temporaries(folder)
    candidates = sorted((c for c in folder.iterdir() if _FOLDER.fullmatch(c.name)), reverse=True)
    faults: list[str] = []
    for candidate in candidates:
        fault = _fault(candidate)
        if fault is None:
            return Checkpoint(candidate, json.loads((candidate / "state.json").read_text())), faults
        faults.append(f"{candidate.name} is damaged ({fault}) and was set aside")
        _quarantine(candidate)
    if candidates:
        raise HostError(
            Problem(
                "no checkpoint of this run can be read",
                str(folder),
                "; ".join(faults),
                "restore one from a backup, or start anew with --fresh (the old run is kept beside it)",
            )
        )
    return None, []


def open_checkpoint(folder: Path, step: int | None) -> Checkpoint:
    """A verified checkpoint to read from: that of `step`, or the newest. Nothing is changed on the disk.

    Raises:
        HostError: there is none, or it is damaged.
    """
    steps = sorted(int(m[1]) for c in folder.glob("step-*") if (m := _FOLDER.fullmatch(c.name)))
    if not steps or (step is not None and step not in steps):
        kept = ", ".join(map(str, steps)) or "none"
        raise HostError(Problem(f"no checkpoint of step {step or '(any)'}", str(folder), f"steps kept: {kept}"))
    chosen = folder / f"step-{steps[-1] if step is None else step:08d}"
    if (fault := _fault(chosen)) is not None:
        raise HostError(Problem("the checkpoint is damaged", str(chosen), fault, "name another step"))
    return Checkpoint(chosen, json.loads((chosen / "state.json").read_text()))


def _write(file: Path, chunks: Any) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0

    def counted() -> Any:
        nonlocal size
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    atomicio.write_synced(file, counted())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if every file is what its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not known to this version"
        for name, expected in manifest["files"].items():
            with (folder / name).open("rb") as file:
                if os.fstat(file.fileno()).st_size != expected["bytes"]:
                    return f"{name} has the wrong size"
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} has other content than was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def _quarantine(folder: Path) -> None:
    target = folder.with_name(folder.name + ".corrupt")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.corrupt-{number}")
    atomicio.rename(folder, target)


def _prune(folder: Path, keep_last: int) -> None:
    whole = sorted(c for c in folder.iterdir() if _FOLDER.fullmatch(c.name))
    for old in whole[:-keep_last]:
        atomicio.remove_folder(old)
