"""LR, loss and gradient norm of a run as one picture, from metrics.jsonl alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_trainer.storage import atomic_files
from lora_trainer.tracking.metrics import step_rows


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Read the completed updates of a metrics file and write the picture as PNG."""
    rows = step_rows(metrics)
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(10, 8), layout="constrained")
    loss_axes, lr_axes, norm_axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.5))
    losses = [row["loss"] for row in rows]
    loss_axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    loss_axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label=f"mean of {window(len(rows))} steps")
    loss_axes.set(ylabel="Loss", title=title, yscale="log")
    loss_axes.legend(loc="upper right")
    lr_axes.plot(steps, [row["lr"] for row in rows], color="tab:orange", linewidth=2)
    lr_axes.set(ylabel="Learning Rate", ylim=(0, None))
    norm_axes.plot(steps, [row["grad_norm"] for row in rows], color="tab:green", linewidth=1)
    norm_axes.set(ylabel="Gradient norm", xlabel="Steps", ylim=(0, None))
    for axes in (loss_axes, lr_axes, norm_axes):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_files.write_file(picture, buffer.getvalue())


def window(num_rows: int) -> int:
    """Width of the smoothing: a twentieth of the run."""
    return max(1, num_rows // 20)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Centred running mean, narrower towards both ends."""
    half = window(len(values)) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
