"""The learning-rate finder's picture: the probe's gain over the LR, and how it was read. Never imports torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lora_trainer.experiments.lr_finder.analysis import Point, RampReading
from lora_trainer.experiments.lr_finder.verification import RunReading
from lora_trainer.storage import atomic_files


def draw_ramp(
    points: Sequence[Point], reading: RampReading, runs: Sequence[RunReading], picture: Path, *, title: str
) -> None:
    """Write the picture as PNG: gain with its standard error, onset, crossing, suggestion, range, any short runs."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots()
    finite = [point for point in points if point.is_finite]
    lrs, gains = [p.lr for p in finite], [p.gain for p in finite]
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(lrs, gains, color="tab:blue", linewidth=2, label="gain of the held-out probe")
    below, above = [p.gain - p.se for p in finite], [p.gain + p.se for p in finite]
    axes.fill_between(lrs, below, above, color="tab:blue", alpha=0.2, label="standard error")
    _draw_reading(axes, reading)
    read = [run for run in runs if run.gain is not None]
    if read:
        errors = [run.se or 0.0 for run in read]
        axes.errorbar(
            [f.lr for f in read], [f.gain or 0.0 for f in read], errors, fmt="s", color="tab:red", label="short runs"
        )
    best = max(
        [reading.best.gain if reading.best else 0.0, *(f.gain or 0.0 for f in read), *(p.se for p in finite[:1])]
    )
    if best > 0:  # a diverged end would flatten all that matters
        axes.set_ylim(-0.6 * best, 1.3 * best)
    axes.set(xscale="log", xlabel="Learning Rate", ylabel="Gain over the start", title=title)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_files.write_file(picture, buffer.getvalue())


def _draw_reading(axes: Axes, reading: RampReading) -> None:
    marks = {
        f"onset {reading.onset or 0:.1e}": (reading.onset, "tab:green", "--"),
        f"crossing {reading.crossing or 0:.1e}": (reading.crossing, "tab:red", "--"),
    }
    if reading.verdict == "found":
        marks[f"suggestion {reading.suggestion:.1e}"] = (reading.suggestion, "tab:orange", "-")
    for label, (lr, colour, style) in marks.items():
        if lr is not None:
            axes.axvline(lr, color=colour, linestyle=style, linewidth=2, label=label)
    if reading.low is not None and reading.high is not None:
        axes.axvspan(reading.low, reading.high, color="tab:orange", alpha=0.1, label="sensible range")
