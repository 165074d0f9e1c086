"""The plots of the page, as SVG that takes its colours, light or dark; each with a sentence and its numbers."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lora_trainer.evidence.statistics.paired import smallest
from lora_trainer.evidence.statistics.verdict import Outcome, Pair, Rules, Verdict, smallest_effect
from lora_trainer.report.pictures import smoothed, spread
from lora_trainer.report.runs import ArmRuns, RunRecord
from lora_trainer.report.tables import PERCENT, Table, pair_name
from lora_trainer.tracking.metrics import HELD_OUT, PRIOR, TRAIN, probe_fault

WIDTH_IN, HEIGHT_IN = 4.6, 2.9
NUM_COLOURS = 8
INK, FAINT = "#00fe01", "#00fe02"
"""Stand-ins that become the page's `--ink` and `--line`."""
SERIES = tuple(f"#00fe{16 + index:02x}" for index in range(NUM_COLOURS))
"""Stand-ins that become `--series-1` ... `--series-8`."""
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.2, 1.8)), (0, (6, 2, 1.5, 2)))
"""The page's legend draws as many colours and dashes."""
MARKERS = "osD^vPX*"
_VARIABLES = {INK: "--ink", FAINT: "--line"} | {c: f"--series-{i}" for i, c in enumerate(SERIES, start=1)}
_MARGINS = {"left": 0.155, "right": 0.98, "bottom": 0.16, "top": 0.965}
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_trainer",
    "text.parse_math": False,
    "path.simplify_threshold": 0.3,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), FAINT),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
}
MOST_POINTS, MOST_ROWS, MOST_NAMED, MOST_PAIRS = 600, 9, 6, 10
"""Of a line, of its table, of lines in a sentence, of pairs in a plot."""
NO_DIFFERENCE_COLOUR = 6
BAND_NAMES = ("least noise", "less noise", "more noise", "most noise")
RELATIVE, RATIO_AXIS = "relative to the base", "loss / base's loss"
PROBES = {HELD_OUT: "Held-out loss", TRAIN: "Loss on training images", PRIOR: "Loss on prior images"}
LOGGED = {
    "ratio": (f"Training loss, {RELATIVE} on the same batch", RATIO_AXIS),
    "loss": ("Training loss", "Loss"),
    "grad_norm": ("Gradient norm before clipping", "Gradient norm"),
}
"""Title and axis of what is smoothed, by its key in the log."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture, what it shows in a sentence, and its numbers."""

    title: str
    summary: str
    svg: Markup
    numbers: Table


@dataclass(frozen=True, slots=True)
class Line:
    """Values over steps; `low` and `high` bound a band around them."""

    label: str
    place: tuple[int, int]  # colour and dashes
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def curve_plots(arms: Sequence[ArmRuns]) -> Iterator[Plot]:
    """All plots over steps that the runs have numbers for: the LR, the probes, and what each update logged."""
    yield line_plot("lr", "Learning rate", "Learning Rate", list(_lr_lines(arms)), digits=".3g")
    over_seeds = any(len(arm.runs) > 1 for arm in arms)
    note = "Bands: smallest to largest over seeds." if over_seeds else "Bands: one standard error over images."
    for probe, title in PROBES.items():
        lines = [line for arm in arms if (line := _probe_line(arm, probe)) is not None]
        if lines:
            yield line_plot(f"probe-{probe}", f"{title}, {RELATIVE}", RATIO_AXIS, lines, note=note)
    note = "Running mean over a twentieth of the run, first seed."
    for key, (title, ylabel) in LOGGED.items():
        logged = [(arm, *_logged(arm.runs[0], key)) for arm in arms]
        lines = [Line(arm.name, arm.place, steps, smoothed(values)) for arm, steps, values in logged if steps]
        if lines:
            yield line_plot(key.replace("_", "-"), title, ylabel, lines, note=note)


def _lr_lines(arms: Sequence[ArmRuns]) -> Iterator[Line]:
    """The LR that each update of an arm's first run used; of a single arm that of each param group."""
    if len(arms) > 1:
        yield from (Line(arm.name, arm.place, *_logged(arm.runs[0], "lr")) for arm in arms)
        return
    run = arms[0].runs[0]
    names = [entry["name"] for entry in run.plan["lr_groups"]]
    for number, name in enumerate(names):
        yield Line(name if len(names) > 1 else run.name, (number, 0), *_logged(run, f"lr/{name}"))


def _logged(run: RunRecord, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the updates that logged this."""
    rows = [row for row in run.updates if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _probe_line(arm: ArmRuns, probe: str) -> Line | None:
    """A probe's loss relative to the base: over seeds the mean and the range, of one run its standard error."""
    readings = [[row for row in run.probe(probe) if probe_fault(row) is None] for run in arm.runs]
    by_seed = [rows for rows in readings if rows]
    if not by_seed:
        return None
    steps = sorted(set.intersection(*({row["step"] for row in rows} for rows in by_seed)))
    values = np.array([[row["relative"] for row in rows if row["step"] in steps] for rows in by_seed])
    errors = np.array([row["se"] for row in by_seed[0]]) if len(by_seed) == 1 else 0.0
    low, high = values.min(axis=0) - errors, values.max(axis=0) + errors
    return Line(arm.name, arm.place, steps, values.mean(axis=0), low, high)


def line_plot(
    name: str, title: str, ylabel: str, lines: Sequence[Line], *, note: str = "", digits: str = ".4g"
) -> Plot:
    """One plot of some lines; no legend inside, as the page has one for all plots."""
    last = [f"{line.label} {format(line.values[-1], digits)}" for line in lines[:MOST_NAMED]]
    more = f", and {len(lines) - MOST_NAMED} more in the table" if len(lines) > MOST_NAMED else ""
    summary = f"{title} over steps. {note}{' ' if note else ''}Last values: {'; '.join(last)}{more}."

    def paint(axes: Axes) -> None:
        for line in lines:
            colour, dashes = _colour(line.place), DASHES[line.place[1] % len(DASHES)]
            kept = spread(range(len(line.steps)), MOST_POINTS)
            steps = np.asarray(line.steps)[kept]
            if line.low is not None and line.high is not None:
                low, high = np.asarray(line.low)[kept], np.asarray(line.high)[kept]
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(steps, np.asarray(line.values)[kept], color=colour, linestyle=dashes)
        axes.set(xlabel="Steps", ylabel=ylabel)
        _scale_by_decades(axes, lines)

    shown = spread(sorted({step for line in lines for step in line.steps}), MOST_ROWS)
    by_step = [dict(zip(line.steps, line.values, strict=True)) for line in lines]
    rows = ((str(step), *(format(v[step], digits) if step in v else "–" for v in by_step)) for step in shown)
    numbers = Table(f"{title}, by step", ("step", *(line.label for line in lines)), tuple(rows))
    return Plot(title, summary, _draw(name, summary, paint), numbers)


def _scale_by_decades(axes: Axes, lines: Sequence[Line]) -> None:
    """A log axis for what clearly spans a decade: a fall to a tenth may reach it from either side by rounding.

    It has plain numbers: matplotlib's own labels are TeX, which the page's texts are not read as.
    """
    lowest = min(min(line.values) for line in lines)
    if not 0 < 10.001 * lowest < max(max(line.values) for line in lines):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def band_plot(arms: Sequence[ArmRuns]) -> Plot | None:
    """The last held-out loss in four bands of timesteps, mean over seeds."""
    finals = [(arm, [run.final for run in arm.runs if run.final and run.failure is None]) for arm in arms]
    measured = [(arm, np.mean([row["bands"] for row in rows], axis=0)) for arm, rows in finals if rows]
    if not measured:
        return None
    title = f"Held-out loss by timestep, {RELATIVE}"
    rows = tuple((arm.name, *(f"{value:.4f}" for value in bands)) for arm, bands in measured)
    losses = np.transpose([bands for _, bands in measured])
    lowest = [measured[smallest(band.tolist())][0].name for band in losses]
    named = "; ".join(f"{band}: {name}" for band, name in zip(BAND_NAMES, lowest, strict=True))
    summary = f"{title}, after the last update, in four parts of the timestep range. Lowest number at {named}."

    def paint(axes: Axes) -> None:
        offsets = np.linspace(-0.3, 0.3, len(measured)) if len(measured) > 1 else [0.0]
        for (arm, bands), offset in zip(measured, offsets, strict=True):
            marker = MARKERS[arm.place[1] % len(MARKERS)]
            places = np.arange(len(bands)) + offset
            axes.plot(places, bands, ms=5, color=_colour(arm.place), marker=marker, linestyle="none")
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set_xticks(range(len(BAND_NAMES)), BAND_NAMES)
        axes.set(ylabel=RATIO_AXIS)

    return Plot(title, summary, _draw("bands", summary, paint), Table(title, ("trial", *BAND_NAMES), rows))


def difference_plot(verdict: Verdict, number: int) -> Plot | None:
    """A row per tested pair, as the page explains it; `number` keeps the ids of the plot apart."""
    tested = [pair for pair in verdict.pairs if pair.test is not None]
    if not tested:
        return None
    leader = verdict.arms[0].name
    of_leader = [pair for pair in tested if leader in (pair.better.name, pair.worse.name)]
    drawn = tested if len(tested) <= MOST_PAIRS else of_leader
    with_leader = f" with {leader}, the smallest mean" if len(drawn) < len(tested) else ""
    shown = sum(pair.outcome == Outcome.BETTER for pair in drawn)
    agree = f"In {shown} of them the adjusted interval, the smallest effect and the seeds agree on a difference."
    compared = f"Paired differences of held-out loss for {len(drawn)} pairs{with_leader}."
    summary = f"{compared} {agree} The table of pairs has the numbers."

    def paint(axes: Axes) -> None:
        for row, pair in enumerate(drawn):
            _paint_pair(axes, row, pair, verdict.rules)
        axes.axvline(0, color=INK, linewidth=0.8)
        labels = ["\n".join(textwrap.wrap(pair_name(pair), 26)[:2]) for pair in drawn]
        axes.set_yticks(range(len(drawn)), labels, fontsize=8)
        axes.set(ylim=(len(drawn) - 0.4, -0.6), xlabel="difference of loss, % of the base's loss")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")

    svg = _draw(f"pairs-{number}", summary, paint, height_in=0.9 + 0.42 * len(drawn))
    return Plot(f"Paired differences ({verdict.question.label})", summary, svg, _by_seed(drawn))


def _paint_pair(axes: Axes, row: int, pair: Pair, rules: Rules) -> None:
    assert pair.test is not None and pair.adjusted_interval is not None
    colour = SERIES[0] if pair.outcome == Outcome.BETTER else SERIES[NO_DIFFERENCE_COLOUR]
    span = PERCENT * smallest_effect(pair, rules)
    axes.fill_betweenx([row - 0.4, row + 0.4], -span, span, color=FAINT, alpha=0.6, linewidth=0)
    for bounds, width in ((pair.adjusted_interval, 1.0), (pair.test.interval(rules.level), 4.0)):
        axes.plot([-PERCENT * bound for bound in bounds], [row, row], color=colour, linewidth=width)
    seeds = [-PERCENT * value for value in pair.differences]
    axes.plot(seeds, [row - 0.22] * len(seeds), color=INK, marker="o", ms=2.5, linestyle="none")
    axes.plot([-PERCENT * pair.test.mean], [row], color=colour, marker="D", ms=5, linestyle="none")


def _by_seed(pairs: Sequence[Pair]) -> Table:
    seeds = sorted({seed for pair in pairs for seed in pair.seeds})
    rows = []
    for pair in pairs:
        percents = [f"{-PERCENT * difference:z.3f}" for difference in pair.differences]
        by_seed = dict(zip(pair.seeds, percents, strict=True))
        rows.append((pair_name(pair), *(by_seed.get(seed, "–") for seed in seeds)))
    header = ("pair", *(f"seed {seed}" for seed in seeds))
    return Table("Difference of loss by seed, in percent of the base's loss", header, tuple(rows))


def _draw(name: str, summary: str, paint: Callable[[Axes], None], height_in: float | None = None) -> Markup:
    """Paint axes and return them as an inline SVG of the page.

    Args:
        name: unique on the page; it begins every id inside the picture.
        summary: read aloud in the picture's place.
        height_in: of a plot with long labels, which are made room for; slow, as every text is measured.
    """
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH_IN, height_in or HEIGHT_IN), layout="constrained" if height_in else None)
        axes = figure.subplots(gridspec_kw=None if height_in else _MARGINS)
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


def _colour(place: tuple[int, int]) -> str:
    return SERIES[place[0] % NUM_COLOURS]
