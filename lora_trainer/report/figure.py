"""Plots as SVG that belongs to the page: it takes the page's colours, light or dark, and its text can be read aloud.

And what tables and pictures share.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lora_trainer.storage import atomic_files

WIDTH_IN, HEIGHT_IN = 4.6, 2.9
NUM_COLOURS = 8
_MARGINS = {"left": 0.155, "right": 0.98, "bottom": 0.16, "top": 0.965}
INK, FAINT = "#00fe01", "#00fe02"
"""Stand-ins that become the page's `--ink` and `--line`."""
SERIES = tuple(f"#00fe{16 + index:02x}" for index in range(NUM_COLOURS))
"""Stand-ins that become `--series-1` ... `--series-8`."""
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.2, 1.8)), (0, (6, 2, 1.5, 2)))
MARKERS = "osD^vPX*"
_VARIABLES = {INK: "--ink", FAINT: "--line"} | {c: f"--series-{i}" for i, c in enumerate(SERIES, start=1)}
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_trainer",
    "text.parse_math": False,
    "path.simplify_threshold": 0.3,
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; the first cell of a row heads it."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture, what it shows in a sentence, and its numbers."""

    title: str
    summary: str
    svg: Markup
    numbers: Table


def draw(
    name: str, summary: str, paint: Callable[[Axes], None], *, height_in: float = HEIGHT_IN, long_labels: bool = False
) -> Markup:
    """Paint axes and return them as an inline SVG of the page.

    Args:
        name: unique on the page; it begins every id inside the picture.
        summary: read aloud in the picture's place.
        long_labels: make room for the labels of the axes; slow, as every text is measured.
    """
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained" if long_labels else None)
        axes = figure.subplots(gridspec_kw=None if long_labels else _MARGINS)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        paint(axes)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _of_the_page(buffer.getvalue(), name, summary)


def _of_the_page(svg: str, name: str, summary: str) -> Markup:
    """Strip what only a file of its own needs, give ids a prefix, and colours and fonts to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    assert view_box is not None
    opening = Markup('<svg class="plot" role="img" aria-label="{}" viewBox="{}">').format(summary, view_box[1])
    svg = re.sub(r"<svg[^>]*>", lambda _: str(opening), svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)  # noqa: S704 - drawn by matplotlib, which escapes its texts


def line_style(place: tuple[int, int]) -> dict[str, Any]:
    """Colour by the first number of a place, dashes by the second."""
    return {"color": SERIES[place[0] % NUM_COLOURS], "linestyle": DASHES[place[1] % len(DASHES)]}


def dot_style(place: tuple[int, int]) -> dict[str, Any]:
    """The same with markers in place of dashes."""
    return {"color": SERIES[place[0] % NUM_COLOURS], "marker": MARKERS[place[1] % len(MARKERS)], "linestyle": "none"}


def swatch(place: tuple[int, int]) -> Markup:
    """A short piece of a line, for the legend."""
    dashes = {0: "", 1: "5 2", 2: "2 3", 3: "6 2 1.5 2"}[place[1] % len(DASHES)]
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><line x1="1" x2="27" y1="4" y2="4" '
        'stroke="var(--series-{})" stroke-dasharray="{}"/></svg>'
    ).format(place[0] % NUM_COLOURS + 1, dashes)


def save_png(figure: Figure, picture: Path) -> None:
    """Write a figure that is a file of its own."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_files.write_file(picture, buffer.getvalue())


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spread, the first and the last always among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
