"""Every way in which an image is shown to the model, and its pixels there. Never imports torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_trainer.config.schema import DataConfig, RunConfig
from lora_trainer.data.images import apply_frame, decode, frame
from lora_trainer.data.records import Record
from lora_trainer.diffusion import random_streams
from lora_trainer.errors import DataError, Problem
from lora_trainer.models.family import View

DEFAULT_CROPS = 4


@dataclass(frozen=True, slots=True)
class Framed:
    """One image as it is shown: its part, and whether it is mirrored."""

    record: Record
    view: View
    mirrored: bool = False

    def pixels(self) -> np.ndarray:
        """What the encoder gets: uint8 [resolution, resolution, 3].

        Raises:
            DataError: the file is no longer what it was when it was checked.
        """
        data = self.record.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.record.sha256:
            what = "the image changed while the run was starting"
            raise DataError(Problem(what, str(self.record.path), fix="start again"))
        return apply_frame(decode(data), self.view, mirrored=self.mirrored)


def training_views(config: RunConfig, records: Sequence[Record]) -> dict[tuple[int, int, bool], Framed]:
    """Every way in which a sample may be shown, by (record, crop, mirrored)."""
    data, images = config.data, {}
    for index, record in enumerate(records):
        for crop in range(num_crops(data)):
            place = (0.5, 0.5)
            if data.crop == "random":
                x, y = random_streams.stream(config.seed, "crop place", record.sha256, crop).random(2)
                place = (float(x), float(y))
            for mirrored in (False, True) if data.flip else (False,):
                images[index, crop, mirrored] = Framed(record, frame(record.size, data.resolution, place), mirrored)
    return images


def num_crops(data: DataConfig) -> int:
    """Cached places per image."""
    return 1 if data.crop == "center" else data.crops_per_image or DEFAULT_CROPS
