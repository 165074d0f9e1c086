"""The plots of the page: curves over steps, timestep bands, paired differences; and the picture of one run's curves."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lora_trainer.evidence.statistics.paired import smallest
from lora_trainer.evidence.statistics.verdict import Outcome, Pair, Verdict, smallest_effect
from lora_trainer.report.comparison import ArmRuns
from lora_trainer.report.figure import FAINT, INK, SERIES, Plot, Table, dot_style, draw, line_style, save_png, spread
from lora_trainer.report.run_record import RunRecord
from lora_trainer.report.tables import PERCENT, pair_name
from lora_trainer.tracking.metrics import HELD_OUT, PRIOR, TRAIN, probe_fault, step_rows

MOST_POINTS = 600
MOST_ROWS = 9
MOST_NAMED = 6
MOST_PAIRS_DRAWN = 10
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
            style = line_style(line.place)
            kept = spread(range(len(line.steps)), MOST_POINTS)
            steps = np.asarray(line.steps)[kept]
            if line.low is not None and line.high is not None:
                low, high = np.asarray(line.low)[kept], np.asarray(line.high)[kept]
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
            axes.plot(steps, np.asarray(line.values)[kept], **style)
        axes.set(xlabel="Steps", ylabel=ylabel)
        if _spans_a_decade(lines):
            _scale_by_decades(axes)

    return Plot(title, summary, draw(name, summary, paint), _numbers(title, lines, digits))


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


def _numbers(title: str, lines: Sequence[Line], digits: str) -> Table:
    """The lines' values at some of their steps."""
    steps = spread(sorted({step for line in lines for step in line.steps}), MOST_ROWS)
    by_step = [dict(zip(line.steps, line.values, strict=True)) for line in lines]
    rows = tuple(
        (str(step), *(format(values[step], digits) if step in values else "–" for values in by_step)) for step in steps
    )
    return Table(f"{title}, by step", ("step", *(line.label for line in lines)), rows)


def curve_plots(groups: Sequence[ArmRuns]) -> Iterator[Plot]:
    """All plots over steps that the runs have numbers for: the LR, the probes, and what each update logged."""
    yield line_plot("lr", "Learning rate", "Learning Rate", list(_lr_lines(groups)), digits=".3g")
    over_seeds = any(len(group.runs) > 1 for group in groups)
    note = "Bands: smallest to largest over seeds." if over_seeds else "Bands: one standard error over images."
    for probe, title in PROBES.items():
        lines = [line for group in groups if (line := _probe_line(group, probe)) is not None]
        if lines:
            yield line_plot(f"probe-{probe}", f"{title}, {RELATIVE}", RATIO_AXIS, lines, note=note)
    note = "Running mean over a twentieth of the run, first seed."
    for key, (title, ylabel) in LOGGED.items():
        logged = [(group, *_logged(group.runs[0], key)) for group in groups]
        lines = [Line(group.name, group.place, steps, smoothed(values)) for group, steps, values in logged if steps]
        if lines:
            yield line_plot(key.replace("_", "-"), title, ylabel, lines, note=note)


def _lr_lines(groups: Sequence[ArmRuns]) -> Iterator[Line]:
    """The LR that each update of an arm's first run used; of a single arm that of each LR group."""
    if len(groups) > 1:
        yield from (Line(group.name, group.place, *_logged(group.runs[0], "lr")) for group in groups)
        return
    run = groups[0].runs[0]
    names = [group["name"] for group in run.plan["lr_groups"]]
    for number, name in enumerate(names):
        yield Line(name if len(names) > 1 else run.name, (number, 0), *_logged(run, f"lr/{name}"))


def _logged(run: RunRecord, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the updates that logged this."""
    rows = [row for row in run.updates if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _probe_line(group: ArmRuns, probe: str) -> Line | None:
    """A probe's loss relative to the base: over seeds the mean and the range, of one run its standard error."""
    readings = [[row for row in run.probe(probe) if probe_fault(row) is None] for run in group.runs]
    by_seed = [rows for rows in readings if rows]
    if not by_seed:
        return None
    steps = sorted(set.intersection(*({row["step"] for row in rows} for rows in by_seed)))
    values = np.array([[row["relative"] for row in rows if row["step"] in steps] for rows in by_seed])
    low, high = values.min(axis=0), values.max(axis=0)
    if len(by_seed) == 1:
        errors = np.array([row["se"] for row in by_seed[0]])
        low, high = low - errors, high + errors
    return Line(group.name, group.place, steps, values.mean(axis=0), low, high)


def band_plot(groups: Sequence[ArmRuns]) -> Plot | None:
    """The last held-out loss in four bands of timesteps, mean over seeds."""
    measured = [(group, bands) for group in groups if (bands := _last_bands(group)) is not None]
    if not measured:
        return None
    title = f"Held-out loss by timestep, {RELATIVE}"
    rows = tuple((group.name, *(f"{value:.4f}" for value in bands)) for group, bands in measured)
    losses = np.transpose([bands for _, bands in measured])
    lowest = [measured[smallest(band.tolist())][0].name for band in losses]
    named = "; ".join(f"{band}: {name}" for band, name in zip(BAND_NAMES, lowest, strict=True))
    summary = f"{title}, after the last update, in four parts of the timestep range. Lowest number at {named}."

    def paint(axes: Axes) -> None:
        offsets = np.linspace(-0.3, 0.3, len(measured)) if len(measured) > 1 else [0.0]
        for (group, bands), offset in zip(measured, offsets, strict=True):
            axes.plot(np.arange(len(bands)) + offset, bands, ms=5, **dot_style(group.place))
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set_xticks(range(len(BAND_NAMES)), BAND_NAMES)
        axes.set(ylabel=RATIO_AXIS)

    return Plot(title, summary, draw("bands", summary, paint), Table(title, ("trial", *BAND_NAMES), rows))


def _last_bands(group: ArmRuns) -> np.ndarray | None:
    bands = [run.final["bands"] for run in group.runs if run.final is not None and run.failure is None]
    return np.mean(bands, axis=0) if bands else None


def difference_plot(verdict: Verdict, number: int) -> Plot | None:
    """A row per tested pair: dots are seeds, the thick bar the pair's own interval, the thin one the adjusted interval.

    `number` keeps the ids of the plot apart.
    """
    tested = [pair for pair in verdict.pairs if pair.is_tested]
    if not tested:
        return None
    leader = verdict.arms[0].name
    of_leader = [pair for pair in tested if leader in (pair.better.name, pair.worse.name)]
    drawn = tested if len(tested) <= MOST_PAIRS_DRAWN else of_leader
    with_leader = f" with {leader}, the smallest mean" if len(drawn) < len(tested) else ""
    shown = sum(pair.outcome == Outcome.BETTER for pair in drawn)
    summary = (
        f"Paired differences of held-out loss for {len(drawn)} pairs{with_leader}. In {shown} of them the adjusted "
        "interval, the smallest effect and the seeds agree on a difference. The table of pairs has the numbers."
    )

    def paint(axes: Axes) -> None:
        for row, pair in enumerate(drawn):
            _paint_pair(axes, row, pair, smallest_effect(pair, verdict.rules))
        axes.axvline(0, color=INK, linewidth=0.8)
        labels = ["\n".join(textwrap.wrap(pair_name(pair), 26)[:2]) for pair in drawn]
        axes.set_yticks(range(len(drawn)), labels, fontsize=8)
        axes.set(ylim=(len(drawn) - 0.4, -0.6), xlabel="difference of loss, % of the base's loss")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")

    svg = draw(f"pairs-{number}", summary, paint, height_in=0.9 + 0.42 * len(drawn), long_labels=True)
    return Plot(f"Paired differences ({verdict.question.label})", summary, svg, _by_seed(drawn))


def _paint_pair(axes: Axes, row: int, pair: Pair, least: float) -> None:
    assert pair.test is not None and pair.interval is not None and pair.adjusted_interval is not None
    colour = SERIES[0] if pair.outcome == Outcome.BETTER else SERIES[NO_DIFFERENCE_COLOUR]
    span = PERCENT * least
    axes.fill_betweenx([row - 0.4, row + 0.4], -span, span, color=FAINT, alpha=0.6, linewidth=0)
    for bounds, width in ((pair.adjusted_interval, 1.0), (pair.interval, 4.0)):
        axes.plot([-PERCENT * bound for bound in bounds], [row, row], color=colour, linewidth=width)
    seeds = [-PERCENT * value for value in pair.differences]
    axes.plot(seeds, [row - 0.22] * len(seeds), color=INK, marker="o", ms=2.5, linestyle="none")
    axes.plot([-PERCENT * pair.test.mean], [row], color=colour, marker="D", ms=5, linestyle="none")


def _by_seed(pairs: Sequence[Pair]) -> Table:
    seeds = sorted({seed for pair in pairs for seed in pair.seeds})
    rows = []
    for pair in pairs:
        by_seed = dict(zip(pair.seeds, pair.differences, strict=True))
        values = (f"{-PERCENT * by_seed[seed]:z.3f}" if seed in by_seed else "–" for seed in seeds)
        rows.append((pair_name(pair), *values))
    header = ("pair", *(f"seed {seed}" for seed in seeds))
    return Table("Difference of loss by seed, in percent of the base's loss", header, tuple(rows))


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """LR, loss and gradient norm of the completed updates in a metrics file, as one PNG."""
    rows = step_rows(metrics)
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(10, 8), layout="constrained")
    loss_axes, lr_axes, norm_axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.5))
    losses = [row["loss"] for row in rows]
    loss_axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    loss_axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label=f"mean of {_window(len(rows))} steps")
    loss_axes.set(ylabel="Loss", title=title, yscale="log")
    loss_axes.legend(loc="upper right")
    lr_axes.plot(steps, [row["lr"] for row in rows], color="tab:orange", linewidth=2)
    lr_axes.set(ylabel="Learning Rate", ylim=(0, None))
    norm_axes.plot(steps, [row["grad_norm"] for row in rows], color="tab:green", linewidth=1)
    norm_axes.set(ylabel="Gradient norm", xlabel="Steps", ylim=(0, None))
    for axes in (loss_axes, lr_axes, norm_axes):
        axes.grid(alpha=0.3)
    save_png(figure, picture)


def _window(num_rows: int) -> int:
    """Width of the smoothing: a twentieth of the run."""
    return max(1, num_rows // 20)


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred running mean, narrower towards both ends."""
    half = _window(len(values)) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return ((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)).tolist()
