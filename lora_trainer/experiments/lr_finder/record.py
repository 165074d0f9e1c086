"""What the learning-rate finder leaves: find_lr.json with every measurement, find_lr.png, and the answer in words.

Never imports torch.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from pydantic_core import to_jsonable_python

from lora_trainer.experiments.lr_finder.analysis import (
    MIN_POINTS,
    FinderResult,
    Point,
    RampReading,
    RunReading,
    Verification,
    usual_rules,
)
from lora_trainer.experiments.lr_finder.prepare import PreparedFinder
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.console import needless
from lora_trainer.tracking.metrics import HELD_OUT

DIGITS = 9


def write_result(finder: PreparedFinder, result: FinderResult, tell: Callable[[str], None]) -> list[Path]:
    """Write both files, each whole or not at all; their paths. A fault of the picture is told and ends nothing."""
    json_file, picture = finder.folder / "find_lr.json", finder.folder / "find_lr.png"
    atomic_files.write_json(json_file, _as_json(finder, result))
    title = f"{finder.prepared.config.name}: {result.reading.verdict}, {len(result.points)} updates"
    with needless(picture.name, tell):
        from lora_trainer.report.pictures import save_png

        save_png(_ramp_figure(result, title), picture)
    return [json_file, picture]


def _as_json(finder: PreparedFinder, result: FinderResult) -> dict[str, Any]:
    """Equal for equal configs, but for `time`. Losses are relative to the base's mean of their timestep stratum."""
    prepared = finder.prepared
    content = {
        "config": finder.config,
        "identity": prepared.identity(),
        "ramp": {"start_lr": finder.start_lr, "end_lr": finder.end_lr, "num_updates": finder.options.num_steps},
        "probe": {
            "images": {record.name: record.sha256 for record in prepared.split.probes[HELD_OUT]},
            "start": result.start_NS,
        },
        "points": [
            asdict(point) | {"update": number, "probe": point.relative_NS}
            for number, point in enumerate(result.points, start=1)
        ],
        "finding": result.reading,
        "usual_rules": usual_rules(result.points),
        "forks": None if result.verification is None else _verification(finder, result.verification),
        "lr": result.lr,
        "time": {
            "seconds": round(result.seconds, 1),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    }
    told_once: Any = {"points": {"__all__": {"relative_NS"}}, "finding": {"best": {"relative_NS", "grad_norm"}}}
    return to_jsonable_python(
        content, exclude=told_once, inf_nan_mode="null", fallback=lambda values: np.round(values, DIGITS).tolist()
    )


def _verification(finder: PreparedFinder, verification: Verification) -> dict[str, Any]:
    """The choice, and each short run in the form of a `fork` event: `factor` is on the config's own LR."""
    updates, base_lr = finder.options.num_verify_steps, finder.prepared.config.optimizer.lr
    events = [
        asdict(reading) | {"event": "fork", "step": 0, "updates": updates, "factor": reading.lr / base_lr}
        for reading in verification.readings
    ]
    return {"choice": verification.choice, "reason": verification.reason, "events": events}


def _ramp_figure(result: FinderResult, title: str) -> Figure:
    """The probe's gain over the LR with its standard error, onset, crossing, suggestion, range, any short runs."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots()
    lrs, gains, errors = _columns(point for point in result.points if point.is_finite)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(lrs, gains, color="tab:blue", linewidth=2, label="gain of the held-out probe")
    axes.fill_between(lrs, gains - errors, gains + errors, color="tab:blue", alpha=0.2, label="standard error")
    _draw_reading(axes, result.reading)
    readings = () if result.verification is None else result.verification.readings
    run_lrs, run_gains, run_errors = _columns(run for run in readings if run.gain is not None)
    if len(run_lrs):
        axes.errorbar(run_lrs, run_gains, run_errors, fmt="s", color="tab:red", label="short runs")
    best = result.reading.best.gain if result.reading.best else 0.0
    top = max([best, *run_gains, *errors[:1]])
    if top > 0:  # a diverged end would flatten all that matters
        axes.set_ylim(-0.6 * top, 1.3 * top)
    axes.set(xscale="log", xlabel="Learning Rate", ylabel="Gain over the start", title=title)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return figure


def _columns(readings: Iterable[Point | RunReading]) -> np.ndarray:
    """Learning rates, gains and their standard errors [3, readings]."""
    return np.array([(reading.lr, reading.gain, reading.se) for reading in readings]).reshape(-1, 3).T


def _draw_reading(axes: Axes, reading: RampReading) -> None:
    marks = {"onset": (reading.onset, "tab:green", "--"), "crossing": (reading.crossing, "tab:red", "--")}
    if reading.verdict == "found":
        marks["suggestion"] = (reading.suggestion, "tab:orange", "-")
    for name, (lr, colour, style) in marks.items():
        if lr is not None:
            axes.axvline(lr, color=colour, linestyle=style, linewidth=2, label=f"{name} {lr:.1e}")
    if reading.low is not None and reading.high is not None:
        axes.axvspan(reading.low, reading.high, color="tab:orange", alpha=0.1, label="sensible range")


def answer_rows(finder: PreparedFinder, result: FinderResult) -> Iterator[tuple[str, str]]:
    """The answer in words, with the line to paste."""
    reading = result.reading
    if reading.verdict == "no signal":
        yield "verdict", f"no signal: the held-out loss never fell by more than noise. Use {reading.suggestion:.1e}"
        yield "", "or look for the cause: captions, adapter.targets, a longer ramp (--steps), more images (--images)"
    elif reading.verdict == "too few points":
        decades = f"{finder.start_lr:.0e} to {finder.end_lr:.0e}"
        steps = round(finder.options.num_steps * MIN_POINTS / max(1, reading.num_points) * 1.2)
        yield "verdict", f"only {reading.num_points} updates before the probe rose above its start: too few to read"
        yield "", f"ramp {decades} again with --steps {steps}, or a smaller --start-lr"
    else:
        yield from _reading_rows(finder, result)
    optimizer, lr = finder.prepared.config.optimizer, result.lr
    yield "in the config", f"lr: {lr:.1e}     (under optimizer)"
    yield "on the command line", f"optimizer.lr={lr:.1e}"
    for group in optimizer.groups:
        if group.lr is not None:
            own = f"lr: {group.lr / optimizer.lr * lr:.1e}"
            yield f"group {group.name}", f"{own}     (it kept its ratio to the base LR)"


def _reading_rows(finder: PreparedFinder, result: FinderResult) -> Iterator[tuple[str, str]]:
    reading = result.reading
    assert reading.best is not None and reading.onset is not None
    yield "suggestion", f"{reading.suggestion:.1e}, sensible from {reading.low:.1e} to {reading.high:.1e}"
    yield "onset", f"{reading.onset:.1e}: from here on a tenth of the best gain is kept"
    gain = f"{reading.best.gain:.2%} +- {reading.best.se:.2%} of the base's held-out loss"
    yield "best", f"{reading.best.lr:.1e}: {gain}"
    if reading.crossing is None:
        yield "crossing", f"none up to {finder.end_lr:.1e}: the best LR is the upper end in its place"
        if reading.best.lr == result.points[-1].lr:
            yield "", "the ramp ended while the gain still rose: a larger LR may do better (--end-lr)"
    else:
        yield "crossing", f"{reading.crossing:.1e}: the held-out loss is above its start again"
        yield "", "half of it is the upper end: from B = 0 a ramp overstates the safe LR about twofold"
    for name, lr in usual_rules(result.points).items():
        yield f"rule {name}", "-" if lr is None else f"{lr:.1e}"
    if result.verification is not None:
        yield from _run_rows(finder, result.verification)
    yield "note", "a short test favours large LRs: for runs of thousands of updates prefer the lower half of the range"


def _run_rows(finder: PreparedFinder, verification: Verification) -> Iterator[tuple[str, str]]:
    for run in verification.readings:
        gain = "diverged" if run.gain is None else f"gain {run.gain:+z.3%} +- {run.se:.3%}"
        behind = f", {run.behind:.3%} +- {run.behind_se:.3%} behind the best" if run.behind else ""
        yield f"short run {run.lr:.1e}", gain + behind
    if verification.choice is None:
        yield "verified", f"no: {verification.reason}; the suggestion stands unconfirmed"
    else:
        updates = finder.options.num_verify_steps
        yield "verified", f"{verification.choice:.1e} after {updates} updates each: {verification.reason}"
