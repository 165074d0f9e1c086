"""The plots of a report: LR, held-out loss, timestep bands, what the training loss and the gradients did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes

from lora_trainer.evidence.statistics.paired import smallest
from lora_trainer.report.comparison import ArmRuns
from lora_trainer.report.curves import smoothed
from lora_trainer.report.figure import INK, MARKERS, NUM_COLOURS, SERIES, Plot, Table, draw
from lora_trainer.report.line_plot import Line, line_plot
from lora_trainer.report.run_record import Row, RunRecord
from lora_trainer.tracking.metrics import HELD_OUT, PRIOR, TRAIN, probe_fault

PROBES = {HELD_OUT: "Held-out loss", TRAIN: "Loss on training images", PRIOR: "Loss on prior images"}
BAND_NAMES = ("least noise", "less noise", "more noise", "most noise")
RELATIVE = "relative to the base"


def curve_plots(groups: Sequence[ArmRuns]) -> list[Plot]:
    """All plots over steps that the runs have numbers for."""
    found = [lr_plot(groups)]
    found += [plot for name, title in PROBES.items() if (plot := probe_plot(groups, name, title)) is not None]
    found += training_plots(groups)
    return found


def lr_plot(groups: Sequence[ArmRuns]) -> Plot:
    """The LR that each update used; of a single run, each group's."""
    lines = [
        Line(group.name, group.place, _steps(run), [row["lr"] for row in run.updates])
        for group in groups
        for run in group.runs[:1]
    ]
    if len(groups) == 1:
        lines = list(_lr_groups(groups[0].runs[0]))
    return line_plot("lr", "Learning rate", "Learning Rate", lines, digits=".3g")


def _lr_groups(run: RunRecord) -> Iterator[Line]:
    names = [group["name"] for group in run.plan["lr_groups"]]
    for number, name in enumerate(names):
        values = [row[f"lr/{name}"] for row in run.updates]
        yield Line(name if len(names) > 1 else run.name, (number, 0), _steps(run), values)


def probe_plot(groups: Sequence[ArmRuns], probe: str, title: str) -> Plot | None:
    """A probe's loss relative to the base: over seeds the mean and the range, of one run its standard error."""
    lines = [line for group in groups if (line := _probe_line(group, probe)) is not None]
    if not lines:
        return None
    over_seeds = any(len(group.runs) > 1 for group in groups)
    note = "Bands: smallest to largest over seeds." if over_seeds else "Bands: one standard error over images."
    return line_plot(f"probe-{probe}", f"{title}, {RELATIVE}", "loss / base's loss", lines, note=note)


def _probe_line(group: ArmRuns, probe: str) -> Line | None:
    by_seed = [[row for row in run.probe(probe) if probe_fault(row) is None] for run in group.runs]
    by_seed = [readings for readings in by_seed if readings]
    if not by_seed:
        return None
    steps = sorted(set.intersection(*({row["step"] for row in rows} for rows in by_seed)))
    values = np.array([[row["relative"] for row in rows if row["step"] in steps] for rows in by_seed])
    if len(by_seed) == 1:
        spread_of = np.array([row["se"] for row in by_seed[0] if row["step"] in steps])
        return Line(group.name, group.place, steps, values[0], values[0] - spread_of, values[0] + spread_of)
    return Line(group.name, group.place, steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def training_plots(groups: Sequence[ArmRuns]) -> Iterator[Plot]:
    """Smoothed values of the log, of each arm's first seed."""

    def lines(value: Callable[[Row], float], key: str) -> list[Line]:
        found = []
        for group in groups:
            rows = [row for row in group.runs[0].updates if key in row]
            if rows:
                steps = [row["step"] for row in rows]
                found.append(Line(group.name, group.place, steps, smoothed([value(row) for row in rows]).tolist()))
        return found

    note = "Running mean over a twentieth of the run, first seed."
    ratio = lines(lambda row: row["ratio"], "ratio")
    if ratio:
        title = f"Training loss, {RELATIVE} on the same batch"
        yield line_plot("ratio", title, "loss / base's loss", ratio, note=note)
    yield line_plot("loss", "Training loss", "Loss", lines(lambda row: row["loss"], "loss"), note=note)
    norms = lines(lambda row: row["grad_norm"], "grad_norm")
    yield line_plot("grad-norm", "Gradient norm before clipping", "Gradient norm", norms, note=note)


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
            colour, marker = SERIES[group.place[0] % NUM_COLOURS], MARKERS[group.place[1] % len(MARKERS)]
            axes.plot(np.arange(len(bands)) + offset, bands, color=colour, marker=marker, linestyle="none", ms=5)
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set_xticks(range(len(BAND_NAMES)), BAND_NAMES)
        axes.set(ylabel="loss / base's loss")

    return Plot(title, summary, draw("bands", summary, paint), Table(title, ("trial", *BAND_NAMES), rows))


def _last_bands(group: ArmRuns) -> np.ndarray | None:
    bands = [run.final["bands"] for run in group.runs if run.final is not None and run.failure is None]
    return np.mean(bands, axis=0) if bands else None


def _steps(run: RunRecord) -> list[int]:
    return [row["step"] for row in run.updates]
