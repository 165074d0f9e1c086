"""Pictures that are files of their own: LR curves before training, a run's curves, its samples. Never imports torch."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lora_trainer.errors import printable
from lora_trainer.report.runs import sample_files
from lora_trainer.schedules.schedule import Mark
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.metrics import step_rows

MOST_IN_ONE_PANEL, PANELS_PER_ROW = 8, 4
MOST_NUMBERED_MARKS = 5  # more milestones than this share one entry of the legend
MOST_SAMPLED_STEPS = 8
SOFTWARE = "lora_trainer"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot: the LR of each update, and what happens on the way."""

    label: str
    lrs: Sequence[float]
    marks: Sequence[Mark] = ()


def draw_schedules(
    curves: Sequence[Curve], picture: Path, *, title: str, steps_per_epoch: int | None = None, scale: float = 1.0
) -> None:
    """Write one figure as PNG: all curves in one panel, or a panel each where they are many.

    Epochs stand on the upper edge where their length is given. A smaller `scale` leaves letters as large as they are.
    """
    if len(curves) <= MOST_IN_ONE_PANEL:
        figure = Figure(figsize=(12 * scale, 6 * scale), layout="constrained")
        axes = figure.subplots()
        _draw_panel(axes, curves, title)
        if steps_per_epoch:
            to_epochs_and_back = (lambda update: update / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
            axes.secondary_xaxis("top", functions=to_epochs_and_back).set_xlabel("Epochs")
    else:
        rows = math.ceil(len(curves) / PANELS_PER_ROW)
        figure = Figure(figsize=(16 * scale, 3 * rows * scale))
        figure.suptitle(title)
        panels = list(figure.subplots(rows, PANELS_PER_ROW, squeeze=False).flat)
        _space_out(figure, rows, PANELS_PER_ROW)
        for axes, curve in zip(panels, curves, strict=False):
            _draw_panel(axes, [curve], curve.label, named=False)
        for axes in panels[len(curves) :]:
            axes.set_visible(False)
    save_png(figure, picture)


def _space_out(figure: Figure, rows: int, columns: int) -> None:
    """Room for the letters, in inches. The panels are all alike, and a layout engine would draw each three times."""
    width, height = figure.get_size_inches()
    left, right, bottom, top, between, beneath = 0.85, 0.1, 0.5, 0.7, 0.85, 0.7
    panel_width = (width - left - right - (columns - 1) * between) / columns
    panel_height = (height - bottom - top - (rows - 1) * beneath) / rows
    across = {"left": left / width, "right": 1 - right / width, "wspace": between / panel_width}
    down = {"bottom": bottom / height, "top": 1 - top / height, "hspace": beneath / panel_height}
    figure.subplots_adjust(**across, **down)


def _draw_panel(axes: Axes, curves: Sequence[Curve], title: str, *, named: bool = True) -> None:
    for curve in curves:
        axes.plot(range(len(curve.lrs)), curve.lrs, label=curve.label if named else None, linewidth=2)
    for number, curve in enumerate(curves):
        _draw_marks(axes, curve.marks, colour="red" if len(curves) == 1 else f"C{number}")
    last = max(len(curve.lrs) for curve in curves) - 1
    peak = max(max(curve.lrs) for curve in curves)
    axes.set(xlabel="Steps", ylabel="Learning Rate", title=title, ylim=(0, 1.05 * peak or None), xlim=(0, max(last, 1)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if once := dict(zip(labels, handles, strict=True)):
        axes.legend(once.values(), once.keys(), fontsize="small")


def _draw_marks(axes: Axes, marks: Sequence[Mark], colour: str) -> None:
    """A dashed line per mark; milestones are named by their number unless they are many."""
    numbered = sum(mark.label.startswith("Milestone") for mark in marks)
    for mark in marks:
        many = numbered > MOST_NUMBERED_MARKS and mark.label.startswith("Milestone")
        label = f"{numbered} milestones" if many else mark.label
        axes.axvline(mark.update, color=colour, linestyle="--", linewidth=1, alpha=0.7, label=label)


def terminal_plot(curves: Sequence[Curve], *, title: str, width: int, height: int = 20) -> str:
    """The same curves in characters."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, height)
    for curve in curves:
        plotext.plot(list(range(len(curve.lrs))), list(curve.lrs), label=curve.label)
    for update in sorted({mark.update for curve in curves for mark in curve.marks}):
        plotext.vline(update)
    plotext.title(title)
    plotext.xlabel("Steps")
    plotext.ylabel("Learning Rate")
    return plotext.build()


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """LR, loss and gradient norm of the completed updates in a metrics file, as one PNG."""
    rows = step_rows(metrics)
    steps, losses, lrs, norms = ([row[key] for row in rows] for key in ("step", "loss", "lr", "grad_norm"))
    figure = Figure(figsize=(10, 8), layout="constrained")
    loss_axes, lr_axes, norm_axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.5))
    loss_axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    loss_axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label=f"mean of {_window(len(rows))} steps")
    loss_axes.set(ylabel="Loss", title=title, yscale="log")
    loss_axes.legend(loc="upper right")
    lr_axes.plot(steps, lrs, color="tab:orange", linewidth=2)
    lr_axes.set(ylabel="Learning Rate", ylim=(0, None))
    norm_axes.plot(steps, norms, color="tab:green", linewidth=1)
    norm_axes.set(ylabel="Gradient norm", xlabel="Steps", ylim=(0, None))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    save_png(figure, picture)


def _window(num_rows: int) -> int:
    return max(1, num_rows // 20)


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred running mean over a twentieth of the run, narrower towards both ends."""
    half = _window(len(values)) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return ((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)).tolist()


def draw_grid(folder: Path, prompts: Sequence[str], picture: Path) -> None:
    """Arrange all samples of a run's `samples/` folder; with many steps, first, last and some in between."""
    files = sample_files(folder)
    steps = spread(sorted({step for step, _ in files}), MOST_SAMPLED_STEPS)
    figure = Figure(figsize=(1.9 * len(steps) + 2.4, 1.9 * len(prompts) + 0.5), layout="constrained")
    cells = figure.subplots(len(prompts), len(steps), squeeze=False)
    for (row, column), axes in np.ndenumerate(cells):
        axes.set(xticks=[], yticks=[])
        if (file := files.get((steps[column], row + 1))) is not None:
            with Image.open(file) as image:
                axes.imshow(image.convert("RGB"), interpolation="nearest")
    for axes, step in zip(cells[0], steps, strict=True):
        axes.set_title(step_name(step), fontsize=10)
    for axes, prompt in zip(cells[:, 0], prompts, strict=True):
        label = "\n".join(textwrap.wrap(prompt, 26)[:5])
        axes.set_ylabel(printable(label), rotation=0, ha="right", va="center", fontsize=8)
    save_png(figure, picture)


def step_name(step: int) -> str:
    return "before" if step == 0 else f"step {step}"


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spread, the first and the last always among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def is_our_picture(file: Path) -> bool:
    """Whether `save_png` wrote this file."""
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == SOFTWARE
    except OSError:  # no picture at all
        return False


def save_png(figure: Figure, picture: Path) -> None:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": SOFTWARE})
    atomic_files.write_file(picture, buffer.getvalue())
