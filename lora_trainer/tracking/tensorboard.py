"""The same numbers as TensorBoard events."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lora_trainer.tracking.metrics import StepRow


class TensorBoardLog:
    """Writes scalars; on a resume tells TensorBoard to forget what came after `start_step`.

    A disk that refuses them ends this log, not the training: metrics.jsonl has the same numbers.
    """

    def __init__(self, folder: Path, *, start_step: int, emit: Callable[[str], None]) -> None:
        self._emit, self._refused = emit, False
        self._writer = EventFileWriter(str(folder))
        if start_step:
            event = Event(session_log=SessionLog(status=SessionLog.START), step=start_step, wall_time=time.time())
            self._add(event)

    def step(self, row: StepRow) -> None:
        values = {
            "train/loss": row.loss,
            **{f"train/lr/{group}": lr for group, lr in row.lrs.items()},
            "train/grad_norm": row.grad_norm,
            "speed/images_per_s": row.images_per_s,
        }
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._add(Event(summary=summary, step=row.step, wall_time=time.time()))

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()

    def _add(self, event: Event) -> None:
        if self._refused:
            return
        try:
            self._writer.add_event(event)
        except OSError as error:
            self._refused = True
            self._emit(f"TensorBoard's events end here ({error.strerror}); metrics.jsonl has them all")
