"""The same numbers as TensorBoard events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lora_trainer.tracking.metrics import StepRow


class TensorBoardLog:
    """Writes scalars; on a resume tells TensorBoard to forget what came after `start_step`.

    Whatever refuses them ends this log, not the training: metrics.jsonl has the same numbers.
    """

    def __init__(self, folder: Path, *, start_step: int, emit: Callable[[str], None]) -> None:
        self._emit, self._refused = emit, False
        self._writer = EventFileWriter(str(folder))
        if start_step:
            self._add(start_step, session_log=SessionLog(status=SessionLog.START))

    def step(self, row: StepRow) -> None:
        values = {
            "train/loss": row.loss,
            **{f"train/lr/{group}": lr for group, lr in row.lrs.items()},
            "train/grad_norm": row.grad_norm,
            "speed/images_per_s": row.images_per_s,
        }
        if row.base_loss is not None:
            values["train/ratio"] = row.loss / row.base_loss
        self.scalars(row.step, values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        tagged = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step, summary=Summary(value=tagged))

    def images(self, step: int, files: Sequence[Path]) -> None:
        """The samples of a step, each prompt under a tag of its own."""
        for number, file in enumerate(files, start=1):
            picture = Summary.Image(encoded_image_string=file.read_bytes(), colorspace=3)
            self._add(step, summary=Summary(value=[Summary.Value(tag=f"samples/{number:02d}", image=picture)]))

    def close(self) -> None:
        with suppress(Exception):
            self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        if self._refused:
            return
        try:
            self._writer.add_event(Event(step=step, wall_time=time.time(), **content))
        except Exception as error:  # noqa: BLE001 - whatever a plot, a font or a log comes up with
            self._refused = True
            self._emit(f"TensorBoard's events end here ({error}); metrics.jsonl has them all")
