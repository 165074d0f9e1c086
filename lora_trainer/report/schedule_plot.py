"""Learning-rate curves before anything is trained: as a picture, or in the terminal. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_trainer.report.figure import save_png
from lora_trainer.schedules.schedule import Mark

MOST_IN_ONE_PANEL = 8
MOST_NUMBERED_MARKS = 5  # more milestones than this share one entry of the legend


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot: the LR of each update, and what happens on the way."""

    label: str
    lrs: Sequence[float]
    marks: Sequence[Mark] = ()


def draw_schedules(
    curves: Sequence[Curve], picture: Path, *, title: str, updates_per_epoch: int | None = None, scale: float = 1.0
) -> None:
    """Write one figure as PNG: all curves in one panel, or a panel each where they are many.

    Epochs stand on the upper edge where their length is given. A smaller `scale` leaves letters as large as they are.
    """
    if len(curves) <= MOST_IN_ONE_PANEL:
        figure = Figure(figsize=(12 * scale, 6 * scale), layout="constrained")
        axes = figure.subplots()
        _draw_panel(axes, curves, title)
        if updates_per_epoch:
            to_epochs_and_back = (lambda update: update / updates_per_epoch, lambda epoch: epoch * updates_per_epoch)
            axes.secondary_xaxis("top", functions=to_epochs_and_back).set_xlabel("Epochs")
    else:
        rows = math.ceil(len(curves) / 4)
        figure = Figure(figsize=(16 * scale, 3 * rows * scale))
        figure.suptitle(title)
        panels = list(figure.subplots(rows, 4, squeeze=False).flat)
        _space_out(figure, rows, 4)
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
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=between / panel_width,
        hspace=beneath / panel_height,
    )


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
    once = dict(zip(labels, handles, strict=True))
    if once:
        axes.legend(once.values(), once.keys(), fontsize="small")


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


def _draw_marks(axes: Axes, marks: Sequence[Mark], colour: str) -> None:
    """A dashed line per mark; milestones are named by their number unless they are many."""
    numbered = sum(mark.label.startswith("Milestone") for mark in marks)
    for mark in marks:
        many = numbered > MOST_NUMBERED_MARKS and mark.label.startswith("Milestone")
        label = f"{numbered} milestones" if many else mark.label
        axes.axvline(mark.update, color=colour, linestyle="--", linewidth=1, alpha=0.7, label=label)
