"""Does find-lr find good learning rates, and is it silent where there is nothing to find? About half an hour, one core.

    python -m benchmarks.evaluation.evaluate_find_lr    # writes benchmarks/results/find_lr.json; resumes

On the demo base and data: for ten training seeds the suggestion against the best of nine learning rates, half a decade
apart, each a constant-LR run of 100 updates judged by the held-out probe; `--verify` for the first five seeds. Then
a hundred ramps of a denoiser that is shown noise unrelated to its target and starts at the best possible answer, zero.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_trainer.config.load import load_config
from lora_trainer.config.places import ENVIRONMENT_FILE
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Conditioning
from lora_trainer.experiments.lr_finder.analysis import Point, analyse, judge, usual_rules
from lora_trainer.experiments.lr_finder.prepare import FinderOptions, PreparedFinder, prepare_finder
from lora_trainer.experiments.lr_finder.run import RampObserver, find_lr, run_short
from lora_trainer.runtime.launch import Launch
from lora_trainer.runtime.runtime import joined_processes, start_runtime
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.denoiser import AdaptedDenoiser
from lora_trainer.training.fit import train_loop
from lora_trainer.training.setup import set_up
from lora_trainer.training.writers import GroupWriter

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "find_lr.json"
GRID = [10 ** (exponent / 2) for exponent in range(-10, -1)]  # 1e-5 to 1e-1
NUM_UPDATES, NUM_SHORT, ENOUGH = 100, 50, 0.8
DATA = ["validation={fraction: 0.2, batch_size: 48}", f"output_dir={ROOT / 'build' / 'find-lr'}", "train.threads=1"]
UNLEARNABLE = [*DATA, "adapter.targets=[conv_out, to_v, to_out.0]", "train.batch_size=1", "data.resolution=32"]
NO_SIGNAL_RAMP = FinderOptions(num_steps=40, num_images=2)
SILENT = MainConsole(silent=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--fork-seeds", type=int, default=5)
    parser.add_argument("--no-signal-seeds", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    store = Store(options.output)
    for seed in range(1, options.seeds + 1):
        evaluate_seed(seed, store, with_forks=seed <= options.fork_seeds)
    for seed in range(1, options.no_signal_seeds + 1):
        evaluate_unlearnable(seed, store)
    if options.seeds:
        store.content["summary"] = summary(store.content)
        store.save()
        print(json.dumps(store.content["summary"], indent=2))


class Store:
    """The result file: what is in it is not measured again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def get(self, *place: str, measure: Callable[[], Any]) -> Any:
        """The value at a place of the file; measured and saved where it is missing."""
        node = self.content
        for key in place[:-1]:
            node = node.setdefault(key, {})
        if place[-1] not in node:
            node[place[-1]] = measure()
            self.save()
            print(f"{'/'.join(place)}: {json.dumps(node[place[-1]])[:150]}", flush=True)
        return node[place[-1]]

    def save(self) -> None:
        atomic_files.write_json(self.file, self.content)


def prepared_finder(overrides: list[str], options: FinderOptions) -> PreparedFinder:
    """The finder of the demo's training."""
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    return prepare_finder(config, Launch(), options, SILENT.track)


def evaluate_seed(seed: int, store: Store, *, with_forks: bool) -> None:
    """Ramp, grid, suggestion and short runs around it of one training seed."""
    own = store.content.get("seeds", {}).get(str(seed), {})
    if {"ramp", "suggested_gain"} <= set(own) and len(own["grid"]) == len(GRID) and ("forks" in own or not with_forks):
        return
    finder = prepared_finder([*DATA, f"seed={seed}"], FinderOptions(verify=with_forks, num_verify_steps=NUM_SHORT))
    content = {key: value for key, value in finder.prepared.identity().items() if key.endswith("content")}
    if store.get("content", measure=lambda: content) != content:
        raise SystemExit(f"{store.file} was measured on another base or other images: move it aside")
    store.get("seeds", str(seed), measure=partial(measure_seed, finder))
    report = json.loads((finder.folder / ENVIRONMENT_FILE).read_text())
    store.get("environment", measure=lambda: report)


def measure_seed(finder: PreparedFinder) -> dict[str, Any]:
    """What the finder says, and what constant learning rates gain, its own among them."""
    found = find_lr(finder, console=SILENT)
    whole = replace(finder, options=replace(finder.options, num_verify_steps=NUM_UPDATES))

    def gains(lrs: Sequence[float]) -> list[float | None]:
        with joined_processes(Launch()) as joined:
            group = whole.verification_group(lrs)
            runs = run_short(group, console=SILENT, should_stop=lambda: False, joined=joined)
        return [reading.gain for reading in judge(runs, found.start_NS).readings]

    own: dict[str, Any] = {
        "ramp": {"finding": _reading(found.points), "usual_rules": usual_rules(found.points)},
        "grid": {f"{lr:.2e}": gain for lr, gain in zip(GRID, gains(GRID), strict=True)},
        "suggested_gain": gains([found.reading.suggestion])[0],
    }
    if (verified := found.verification) is not None:
        lrs = [reading.lr for reading in verified.readings]
        own["forks"] = {"lrs": lrs, "choice": verified.choice, "reason": verified.reason}
    return own


def evaluate_unlearnable(seed: int, store: Store) -> None:
    """The verdict on a denoiser that has nothing to learn."""

    def verdict() -> dict[str, Any]:
        finder = prepared_finder([*UNLEARNABLE, f"seed={seed}", f"validation.seed={seed}"], NO_SIGNAL_RAMP)
        ramp = RampObserver(finder, SILENT)
        with start_runtime(Launch(), "fp32", 1) as runtime:
            group = finder.ramp_group()
            setup = set_up(group, runtime, SILENT, trials_per_pass=1)
            make_unlearnable(setup.denoiser)
            with closing(GroupWriter(group, setup, SILENT, lambda: None)) as writer:
                writer.open(None)
                train_loop(0, setup, writer, console=SILENT, should_stop=lambda: False, on_measure=ramp.observe)
        return _reading([*ramp.points.values()])

    store.get("unlearnable", str(seed), measure=verdict)


@torch.no_grad()
def make_unlearnable(denoiser: AdaptedDenoiser) -> None:
    """Show the denoiser other noise than the one it is asked for, and let it start at zero, the best answer then."""
    for parameter in denoiser.bank.denoiser.conv_out.base_layer.parameters():  # type: ignore[union-attr]
        parameter.zero_()
    predict = denoiser.family.predict

    def blind(model: Any, noisy: torch.Tensor, timesteps: torch.Tensor, said: Conditioning) -> torch.Tensor:
        keys = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in noisy]
        other = torch.stack(
            [random_streams.normal(image.shape, 0, "unrelated", key) for image, key in zip(noisy, keys, strict=True)]
        )
        return predict(model, other, timesteps, said)

    denoiser.family.predict = blind  # type: ignore[method-assign, assignment]


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """The figures that docs/find_lr.md quotes."""
    seeds = [own for own in content.get("seeds", {}).values() if "suggested_gain" in own]
    shares = [own["suggested_gain"] / _best(own) if own["suggested_gain"] is not None else 0.0 for own in seeds]
    suggestions = [own["ramp"]["finding"]["suggestion"] for own in seeds]
    rules: dict[str, list[float]] = {}
    for own in seeds:
        for name, lr in own["ramp"]["usual_rules"].items():
            rules.setdefault(name, []).append(0.0 if lr is None else _interpolated(own["grid"], lr) / _best(own))
    forked = [own for own in seeds if own.get("forks", {}).get("choice")]
    within = [abs(math.log(own["forks"]["choice"] / _best_lr(own))) <= math.log(10**0.5) + 0.02 for own in forked]
    blind = list(content.get("unlearnable", {}).values())
    return {
        "num_seeds": len(seeds),
        f"suggestion_reaches_{ENOUGH:.0%}": sum(share >= ENOUGH for share in shares),
        "share_of_best_gain": _spread(shares),
        "suggestions": _spread(suggestions),
        "suggestions_spread_decades": round(math.log10(max(suggestions) / min(suggestions)), 3),
        "best_lr_of_grid": _spread([_best_lr(own) for own in seeds]),
        "share_of_best_gain_by_usual_rule_interpolated": {name: _spread(values) for name, values in rules.items()},
        "forks_within_half_a_decade_of_best": f"{sum(within)} of {len(within)}",
        "no_signal": f"{sum(each['verdict'] == 'no signal' for each in blind)} of {len(blind)}",
    }


def _reading(points: Sequence[Point]) -> dict[str, Any]:
    finding = analyse(points, 1e-4)
    best = None if finding.best is None else {"lr": finding.best.lr, "gain": finding.best.gain, "se": finding.best.se}
    strongest = max((p.gain / p.se for p in points if p.is_finite and p.se > 0), default=0.0)
    return {
        "verdict": finding.verdict,
        "suggestion": finding.suggestion,
        "onset": finding.onset,
        "crossing": finding.crossing,
        "high": finding.high,
        "best": best,
        "num_updates": len(points),
        "strongest_gain_in_se": round(strongest, 2),
    }


def _best(own: dict[str, Any]) -> float:
    """Best gain of the grid and the suggestion."""
    return max(gain for gain in (*own["grid"].values(), own["suggested_gain"]) if gain is not None)


def _best_lr(own: dict[str, Any]) -> float:
    return float(max(own["grid"], key=lambda lr: own["grid"][lr] if own["grid"][lr] is not None else -math.inf))


def _interpolated(grid: dict[str, float | None], lr: float) -> float:
    """Gain at a learning rate between two of the grid, in log LR; a diverged one counts as no gain."""
    lrs = [math.log(float(text)) for text in grid]
    gains = [0.0 if gain is None else max(0.0, gain) for gain in grid.values()]
    order = np.argsort(lrs)
    return float(np.interp(math.log(lr), np.array(lrs)[order], np.array(gains)[order]))


def _spread(values: list[float]) -> dict[str, float]:
    return {
        name: float(f"{pick(values):.3g}") for name, pick in (("min", min), ("median", statistics.median), ("max", max))
    }


if __name__ == "__main__":
    main()
