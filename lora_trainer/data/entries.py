"""What the cache holds for a run: the name of every entry, before anything is encoded. Never imports torch.

An entry's name is the hash of everything that shapes it: the image's bytes and framing, or the text, and the encoder's
weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_trainer.config.places import cache_folder
from lora_trainer.config.schema import DataConfig, RunConfig
from lora_trainer.data.images import apply_frame, decode, frame
from lora_trainer.data.records import Record
from lora_trainer.diffusion import random_streams
from lora_trainer.errors import DataError, Problem
from lora_trainer.models.family import Family, View

LAYOUT = "1"  # part of every entry's name: raise it when the way of encoding changes
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


@dataclass(frozen=True, slots=True)
class Entries:
    """The file of each text and image that a run may ask for."""

    texts: Mapping[str, Path]
    images: Mapping[Framed, Path]
    training: Mapping[tuple[int, int, bool], Framed]
    """Every way in which a sample may be shown, by (record, crop, mirrored)."""
    probes: Mapping[str, Sequence[Framed]]

    def missing_bytes(self, family: Family, resolution: int) -> int:
        """About what those take that are not there yet."""
        of_image, of_text = family.entry_bytes(resolution)
        num_texts, num_images = (sum(not f.is_file() for f in files.values()) for files in (self.texts, self.images))
        return num_images * of_image + num_texts * of_text


def entries_of(
    config: RunConfig,
    family: Family,
    records: Sequence[Record],
    watched: Mapping[str, Sequence[Record]],
    base_digests: Mapping[str, str],
) -> Entries:
    """All that a run reads from the cache.

    Args:
        records: those that are trained on.
        watched: those of each probe.
        base_digests: the contents of the base's components: an entry belongs to one encoder's weights.
    """
    folder, resolution = cache_folder(config), config.data.resolution
    captioned = [*records, *(record for probe in watched.values() for record in probe)]
    encoders = "".join(base_digests[component] for component in family.prompt_components)
    training = training_views(config, records)
    probes = {name: [Framed(r, frame(r.size, resolution)) for r in probe] for name, probe in watched.items()}
    images = dict.fromkeys([*training.values(), *(image for row in probes.values() for image in row)])
    return Entries(
        {text: _entry_file(folder / "prompts", "prompt tensors", encoders, text) for text in _texts(config, captioned)},
        {image: _latent_file(image, folder, base_digests["vae"]) for image in images},
        training,
        probes,
    )


def _texts(config: RunConfig, records: Sequence[Record]) -> list[str]:
    """Every prompt that a run may ask for: captions, the empty one, samples."""
    captions = (caption for record in records for caption in record.captions)
    samples = (text for p in config.sample.prompts for text in (p.prompt, p.negative_prompt))
    return list(dict.fromkeys(["", *captions, *samples]))


def _entry_file(folder: Path, *content: Any) -> Path:
    """The entry of this content."""
    return folder / f"{hashlib.sha256(json.dumps([LAYOUT, *content]).encode()).hexdigest()}.safetensors"


def _latent_file(image: Framed, folder: Path, encoder: str) -> Path:
    """Where the latents of an image are kept."""
    view = image.view
    place = (view.scaled_size, view.left, view.top, view.resolution)
    return _entry_file(folder / "latents", "latent", encoder, image.record.sha256, place, image.mirrored)


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
