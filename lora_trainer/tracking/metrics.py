"""metrics.jsonl: one JSON object per completed update and trial, and events. The record that everything else reads."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_trainer.storage.atomic_files import AppendLog, open_regular
from lora_trainer.storage.records import Finite, Text, Update, read_log, shape, shape_fault

TIMING_FIELDS = ("images_per_s", "step_s", "peak_memory_gib", "elapsed_s")
"""Fields that differ between two otherwise equal runs."""
HELD_OUT, TRAIN, PRIOR = "held_out", "train", "prior"
"""What `validation` events call the probes of the three sets of images."""
UPDATE = "update"
_ESSENTIAL = {
    UPDATE: {"trial", "lr", "grad_norm"},
    "validation": {"probe", "items"},
    "skip": {"reason"},
    "failed": {"reason"},
    "stopped": {"reason"},
    "fork": {"items"},
    "cooldown": {"items"},
    "diagnosis": {"findings"},
    "renamed": {"trial", "before"},
}
"""Fields, besides `step`, without which a line is no row of its event; an update is none."""
_Reading = Finite | Literal["nan", "inf", "-inf"]


_FINDING = shape({"state": Text, "evidence": Text, "confidence": Text | None, "advice": list[dict[Text, Any]]})
_NUMBERS = ("lr", "grad_norm", "factor", "ratio", "base_loss", "images_per_s", "peak_memory_gib", "elapsed_s")
_ROW = shape(
    {"step": Update},
    {
        **dict.fromkeys(_NUMBERS, Finite),
        **dict.fromkeys(("event", "trial", "before", "reason", "probe", "draws"), Text),
        **dict.fromkeys(("relative", "se", "loss"), _Reading),
        "items": Annotated[list[_Reading], Field(min_length=1)],
        "bands": Annotated[list[_Reading], Field(min_length=4, max_length=4)],
        "files": list[Text],
        "findings": list[_FINDING],  # type: ignore[valid-type]
    },
)
"""What the fields of rows hold, whatever the event."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One completed update of one trial; `lrs` are the rates that this update used, the denoiser's first."""

    step: int
    trial: str
    epoch: float
    loss: float
    lrs: dict[str, float]
    grad_norm: float
    clipped: bool
    images_per_s: float
    peak_memory_gib: float
    draws: str
    """Hash of the images, timesteps and noise of the update."""
    step_size: float | None = None
    base_loss: float | None = None

    @property
    def lr(self) -> float:
        """The denoiser's."""
        return next(iter(self.lrs.values()))


class MetricsLog:
    """Appends rows; a resume cuts the file back to the length that the checkpoint knows."""

    def __init__(self, path: Path, *, keep_bytes: int) -> None:
        self._log = AppendLog(path, keep_bytes=keep_bytes)
        self._began = time.monotonic() - last_elapsed(path)

    def step(self, row: StepRow) -> None:
        content = {
            "step": row.step,
            "trial": row.trial,
            "epoch": round(row.epoch, 6),
            "loss": row.loss,
            "lr": row.lr,
            **{f"lr/{group}": lr for group, lr in row.lrs.items()},
            **({} if row.step_size is None else {"d": row.step_size, "d*lr": row.step_size * row.lr}),
            **({} if row.base_loss is None else {"base_loss": row.base_loss, "ratio": row.loss / row.base_loss}),
            "grad_norm": row.grad_norm,
            "clipped": row.clipped,
            "draws": row.draws,
            "images_per_s": round(row.images_per_s, 3),
            "peak_memory_gib": round(row.peak_memory_gib, 3),
        }
        self._append(content)

    def event(self, name: str, step: int, **content: Any) -> None:
        """A line with an `event` field: validation, sample, checkpoint, resume, skip ..."""
        self._append({"event": name, "step": step, **finite(content)})

    def sync(self) -> int:
        """Bring the rows to the disk, as far as it takes them; the file's length in bytes with all of them."""
        return self._log.sync()

    def close(self) -> None:
        self._log.close()

    def _append(self, content: dict[str, Any]) -> None:
        elapsed = round(time.monotonic() - self._began, 3)
        self._log.append(json.dumps({**content, "elapsed_s": elapsed}, allow_nan=False))


def finite(content: Any) -> Any:
    """The same content with NaN and infinities spelled as strings, which JSON has no numbers for."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line of a metrics file as `parse_row` reads it; a last one that a kill cut short is left out."""
    return (parse_row(line) for line, _ in read_log(path))


def last_elapsed(path: Path) -> float:
    """Seconds of training that the last rows of a log tell of, over all starts; 0 where they tell nothing."""
    with open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        told = [(parse_row(line) or {}).get("elapsed_s") for line in file]
    return float(next((seconds for seconds in reversed(told) if isinstance(seconds, int | float)), 0.0))


def probe_fault(row: Mapping[str, Any]) -> str | None:
    """Why the loss of a `validation` row counts for nothing: it is no finite number. None where it is one."""
    value = row.get("relative", "not recorded")
    named = row["probe"].replace("_", "-")
    return f"the {named} loss at step {row['step']} is {value}" if isinstance(value, str) else None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """All rows of a metrics file, without its damaged lines."""
    return (row for row in read_lines(path) if row is not None)


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None where the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if shape_fault(row, _ROW) is not None or not all(
        isinstance(rate, int | float) for key, rate in row.items() if key.startswith("lr/")
    ):
        return None
    return row if row.keys() >= _ESSENTIAL.get(str(row.get("event", UPDATE)), set()) else None


def damage_note(log: str, num_damaged: int) -> str:
    """The sentence that tells of a log's damaged lines."""
    return f"{log}: {num_damaged} damaged line(s) are left out"


def step_rows(path: Path, trial: str | None = None) -> list[dict[str, Any]]:
    """The rows of completed updates, of one trial where it is named."""
    return [r for r in read_rows(path) if "event" not in r and (trial is None or r["trial"] == trial)]
