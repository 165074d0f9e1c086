"""Samples as a table of pictures inside the page: trial by prompt, or step by prompt of one run."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_trainer.report.comparison import ArmRuns
from lora_trainer.report.run_record import RunRecord
from lora_trainer.report.sample_grid import spread

MOST_STEPS = 6
PIXELS, AS_IT_IS = 256, 128


@dataclass(frozen=True, slots=True)
class Picture:
    """One sample; `alt` says what it is in the picture's place."""

    source: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SampleTable:
    """A row per prompt."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Picture | None, ...]], ...]


def sample_table(groups: Sequence[ArmRuns]) -> SampleTable | None:
    """The last samples of each trial side by side; of a single run its samples over steps. None without samples."""
    runs = [run for group in groups for run in group.runs]
    if not any(run.samples for run in runs):
        return None
    if len(runs) == 1:
        return _over_steps(runs[0])
    firsts = [group.runs[0] for group in groups]
    names = [group.name for group in groups]
    prompts = list(dict.fromkeys(prompt for run in firsts for prompt in run.prompts))
    rows = tuple((text, tuple(_last(r, text, n) for r, n in zip(firsts, names, strict=True))) for text in prompts)
    seeds = sorted({run.seed for run in firsts})
    told = f"training seed {seeds[0]}" if len(seeds) == 1 else "the first training seed of each"
    return SampleTable(f"Last samples of each trial, equal image seeds, {told}", tuple(names), rows)


def _over_steps(run: RunRecord) -> SampleTable:
    steps = spread(sorted({step for step, _ in run.samples}), MOST_STEPS)
    columns = tuple("before" if step == 0 else f"step {step}" for step in steps)
    rows = tuple(
        (text, tuple(_picture(run.samples.get((step, number)), f"{text}, step {step}") for step in steps))
        for number, text in enumerate(run.prompts, start=1)
    )
    return SampleTable("Samples with equal image seeds as the training went on", columns, rows)


def _last(run: RunRecord, prompt: str, name: str) -> Picture | None:
    if prompt not in run.prompts or not run.samples:
        return None
    step = max(step for step, _ in run.samples)
    return _picture(run.samples.get((step, run.prompts.index(prompt) + 1)), f"{prompt}, {name}, step {step}")


def _picture(file: Path | None, alt: str) -> Picture | None:
    """Small pictures as they are, larger ones as JPEG thumbnails, so that the page stays small."""
    if file is None:
        return None
    with Image.open(file) as image:
        if max(image.size) <= AS_IT_IS:
            data, kind, (width, height) = file.read_bytes(), "png", image.size
        else:
            small = image.convert("RGB")
            small.thumbnail((PIXELS, PIXELS))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=88)
            data, kind, (width, height) = buffer.getvalue(), "jpeg", small.size
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", alt, width, height)
