"""Samples side by side: a row per prompt, a column per step or per trial; in one picture, or inside the page."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from lora_trainer.report.comparison import ArmRuns
from lora_trainer.report.figure import save_png, spread
from lora_trainer.report.run_record import RunRecord, sample_files

MOST_COLUMNS, MOST_STEPS = 8, 6
"""Steps shown in a picture, and on the page."""
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


def draw_grid(folder: Path, prompts: Sequence[str], picture: Path) -> None:
    """Arrange all samples of a run's `samples/` folder; with many steps, first, last and some in between."""
    files = sample_files(folder)
    steps = spread(sorted({step for step, _ in files}), MOST_COLUMNS)
    figure = Figure(figsize=(1.9 * len(steps) + 2.4, 1.9 * len(prompts) + 0.5), layout="constrained")
    cells = figure.subplots(len(prompts), len(steps), squeeze=False)
    for row, prompt in enumerate(prompts, start=1):
        for column, step in enumerate(steps):
            axes = cells[row - 1][column]
            axes.set(xticks=[], yticks=[])
            if (step, row) in files:
                with Image.open(files[step, row]) as image:
                    axes.imshow(image.convert("RGB"), interpolation="nearest")
            if row == 1:
                axes.set_title(_column(step), fontsize=10)
        label = "\n".join(textwrap.wrap(prompt, 26)[:5])
        cells[row - 1][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    save_png(figure, picture)


def _column(step: int) -> str:
    return "before" if step == 0 else f"step {step}"


def sample_table(groups: Sequence[ArmRuns]) -> SampleTable | None:
    """The last samples of each trial side by side; of a single run its samples over steps. None without samples."""
    runs = [run for group in groups for run in group.runs]
    if not any(run.samples for run in runs):
        return None
    if len(runs) == 1:
        return _over_steps(runs[0])
    firsts = [(group.name, group.runs[0]) for group in groups]
    prompts = dict.fromkeys(prompt for _, run in firsts for prompt in run.prompts)
    rows = tuple((text, tuple(_last(run, text, name) for name, run in firsts)) for text in prompts)
    seeds = sorted({run.seed for _, run in firsts})
    which = f"training seed {seeds[0]}" if len(seeds) == 1 else "the first training seed of each"
    return SampleTable(
        f"Last samples of each trial, equal image seeds, {which}", tuple(name for name, _ in firsts), rows
    )


def _over_steps(run: RunRecord) -> SampleTable:
    steps = spread(sorted({step for step, _ in run.samples}), MOST_STEPS)
    rows = tuple(
        (text, tuple(_picture(run.samples.get((step, number)), f"{text}, step {step}") for step in steps))
        for number, text in enumerate(run.prompts, start=1)
    )
    return SampleTable("Samples with equal image seeds as the training went on", tuple(map(_column, steps)), rows)


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
