"""Run directories written by hand: what a finished run leaves for a report, with numbers of our choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

STEPS, EVERY, NUM_ITEMS = 40, 10, 3


def write_run(
    folder: Path,
    *,
    loss: float = 0.95,
    seed: int = 1,
    schedule: str = "cosine",
    lr: float = 1e-3,
    done: int = STEPS,
    budget: float = 0.5,
    prompts: Sequence[str] = (),
    draws: str = "d",
    status: tuple[int, str, str] | None = None,
    probes: Sequence[str] = ("held_out", "train"),
    ending: tuple[str, str] | None = None,
    events: Sequence[dict[str, Any]] = (),
    **identity: Any,
) -> Path:
    """A run whose held-out loss goes straight from 1 to `loss`; keyword arguments with `__` for dots are settings."""
    folder.mkdir(parents=True)
    own = {
        "seed": seed,
        "optimizer.lr": lr,
        "lr_scheduler.type": schedule,
        "base content": "b",
        "data content": "d",
        "validation content": "v",
        "validation.seed": 0,
        "data.resolution": 64,
    } | {key.replace("__", "."): value for key, value in identity.items()}
    groups = [{"name": "unet", "schedule": schedule, "lr_peak": lr, "lr_budget": budget}]
    plan = {"identity": own, "num_updates": STEPS, "global_batch": 4, "lr_groups": groups}
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {"device": "a processor", "packages": {"torch": "2"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    settings = {"sample": {"prompts": [{"prompt": prompt} for prompt in prompts]}}
    (folder / "config.yaml").write_text(json.dumps(settings))
    if status is not None:
        code, name, message = status
        (folder / "exit.json").write_text(json.dumps({"code": code, "status": name, "message": message}))
    rows = [row for step in range(done + 1) for row in _rows(step, loss, lr, probes, f"{draws}{seed}-{step}")]
    rows += events
    if ending is not None:
        rows.append({"event": ending[0], "step": done, "trial": "t", "reason": ending[1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(1, len(prompts) + 1):
        (folder / "samples").mkdir(exist_ok=True)
        for step, size in ((0, 64), (done, 200)):
            pixels = np.full((size, size, 3), 40 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "samples" / f"step-{step:08d}-{number:02d}.png")
    return folder


def _rows(step: int, loss: float, lr: float, probes: Sequence[str], draws: str) -> list[dict[str, Any]]:
    relative = 1 + (loss - 1) * step / STEPS
    rows: list[dict[str, Any]] = []
    if step:
        rate = lr * (1 - step / STEPS)
        rows.append(
            {"step": step, "trial": "t", "loss": 0.1, "lr": rate, "lr/unet": rate, "grad_norm": 0.5, "draws": draws}
            | {"images_per_s": 8.0, "peak_memory_gib": 1.5, "ratio": relative}
        )
    if step % EVERY == 0:
        reading = {"relative": relative, "se": 0.002, "bands": [relative] * 4, "items": [relative] * NUM_ITEMS}
        rows += [{"event": "validation", "step": step, "probe": probe, **reading} for probe in probes]
    return rows


def write_sweep(folder: Path, arms: dict[str, float], seeds: Sequence[int], **options: Any) -> Path:
    """A finished sweep of schedules at one LR, each seed a little off in its own way; `options` are those of a run."""
    trials = []
    for number, (arm, loss) in enumerate(arms.items()):
        for seed in seeds:
            name = f"{arm}-seed{seed}"
            own = loss + 1e-3 * seed + 1e-4 * ((seed * (number + 2)) % 3)
            write_run(folder / "trials" / name, schedule=arm, loss=own, seed=seed, **options)
            row = {"name": name, "arm": arm, "setting": arm, "folder": f"trials/{name}"}
            trials.append({**row, "status": "finished", "step": 1})
    trials.append({"name": "later", "arm": "later", "setting": "later", "folder": "trials/later"})
    trials[-1] |= {"status": "waiting", "step": 0}
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "trials": trials}))
    return folder
