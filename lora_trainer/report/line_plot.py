"""Lines over steps, with bands of uncertainty and a table of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from lora_trainer.report.figure import DASHES, NUM_COLOURS, SERIES, Plot, Table, draw
from lora_trainer.report.sample_grid import spread

MOST_POINTS = 600
MOST_ROWS = 9
MOST_NAMED = 6


@dataclass(frozen=True, slots=True)
class Line:
    """Values over steps; `low` and `high` bound a band around them."""

    label: str
    place: tuple[int, int]
    """Colour and dashes."""
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def line_plot(
    name: str, title: str, ylabel: str, lines: Sequence[Line], *, note: str = "", digits: str = ".4g"
) -> Plot:
    """One plot of some lines; no legend inside, as the page has one for all plots."""
    last = [f"{line.label} {format(line.values[-1], digits)}" for line in lines[:MOST_NAMED]]
    more = f", and {len(lines) - MOST_NAMED} more in the table" if len(lines) > MOST_NAMED else ""
    summary = f"{title} over steps. {note}{' ' if note else ''}Last values: {'; '.join(last)}{more}."

    def paint(axes: Axes) -> None:
        for line in lines:
            colour, dashes = SERIES[line.place[0] % NUM_COLOURS], DASHES[line.place[1] % len(DASHES)]
            kept = spread(range(len(line.steps)), MOST_POINTS)
            steps = np.asarray(line.steps)[kept]
            if line.low is not None and line.high is not None:
                low, high = np.asarray(line.low)[kept], np.asarray(line.high)[kept]
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(steps, np.asarray(line.values)[kept], color=colour, linestyle=dashes)
        axes.set(xlabel="Steps", ylabel=ylabel)
        if _spans_a_decade(lines):
            _scale_by_decades(axes)

    return Plot(title, summary, draw(name, summary, paint), numbers(title, lines, digits))


def _spans_a_decade(lines: Sequence[Line]) -> bool:
    """Clearly: a schedule that ends at a tenth of its peak may reach it from either side by rounding."""
    lowest = min(min(line.values) for line in lines)
    return lowest > 0 and max(max(line.values) for line in lines) > 10.001 * lowest


def _scale_by_decades(axes: Axes) -> None:
    """A log axis with plain numbers: matplotlib's own labels are TeX, which the page's texts are not read as."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def numbers(title: str, lines: Sequence[Line], digits: str) -> Table:
    """The lines' values at some of their steps."""
    steps = spread(sorted({step for line in lines for step in line.steps}), MOST_ROWS)
    by_step = [dict(zip(line.steps, line.values, strict=True)) for line in lines]
    rows = tuple(
        (str(step), *(format(values[step], digits) if step in values else "–" for values in by_step)) for step in steps
    )
    return Table(f"{title}, by step", ("step", *(line.label for line in lines)), rows)


def swatch(place: tuple[int, int]) -> Markup:
    """A short piece of a line, for the legend."""
    dashes = {0: "", 1: "5 2", 2: "2 3", 3: "6 2 1.5 2"}[place[1] % len(DASHES)]
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><line x1="1" x2="27" y1="4" y2="4" '
        'stroke="var(--series-{})" stroke-dasharray="{}"/></svg>'
    ).format(place[0] % NUM_COLOURS + 1, dashes)
