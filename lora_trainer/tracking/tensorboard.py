"""The same numbers as TensorBoard events."""

from __future__ import annotations

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lora_trainer.tracking.metrics import StepRow


class TensorBoardLog:
    """Writes scalars; on a resume tells TensorBoard to forget what came after `start_step`."""

    def __init__(self, folder: Path, *, start_step: int) -> None:
        self._writer = EventFileWriter(str(folder))
        if start_step:
            event = Event(session_log=SessionLog(status=SessionLog.START), step=start_step, wall_time=time.time())
            self._writer.add_event(event)

    def step(self, row: StepRow) -> None:
        values = {
            "train/loss": row.loss,
            **{f"train/lr/{group}": lr for group, lr in row.lrs.items()},
            "train/grad_norm": row.grad_norm,
            "speed/images_per_s": row.images_per_s,
        }
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer.add_event(Event(summary=summary, step=row.step, wall_time=time.time()))

    def close(self) -> None:
        self._writer.close()
