"""Samples side by side: one row per prompt, one column per step, so that a run can be seen at a glance."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lora_trainer.storage import atomic_files

_SAMPLE = re.compile(r"step-(\d{8})-(\d+)\.png")
MAX_COLUMNS = 8
T = TypeVar("T")


def draw_grid(folder: Path, prompts: Sequence[str], picture: Path) -> None:
    """Arrange all samples of a run's `samples/` folder; with many steps, first, last and some in between."""
    files = {(int(m[1]), int(m[2])): file for file in folder.iterdir() if (m := _SAMPLE.fullmatch(file.name))}
    steps = spread(sorted({step for step, _ in files}), MAX_COLUMNS)
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
                axes.set_title("before" if step == 0 else f"step {step}", fontsize=10)
        label = "\n".join(textwrap.wrap(prompt, 26)[:5])
        cells[row - 1][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_files.write_file(picture, buffer.getvalue())


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spread, the first and the last always among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
