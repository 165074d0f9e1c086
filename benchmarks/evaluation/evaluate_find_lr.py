"""Does find-lr find good learning rates, and is it silent where there is nothing to find? About half an hour, one core.

    python -m benchmarks.evaluation.evaluate_find_lr    # writes benchmarks/results/find_lr.json; resumes

On the demo base and data: for ten training seeds the suggestion against the best of nine learning rates, half a decade
apart, each a constant-LR run of 100 updates judged by the held-out probe; the fork test for the first five seeds. Then
a hundred ramps of a denoiser that is shown noise unrelated to its target and starts at the best possible answer, zero.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_trainer.experiments.lr_finder.forks import Fork, fork_lrs, judge_forks
from lora_trainer.experiments.lr_finder.usual_rules import usual_rules

from lora_trainer.config.load import load_config
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Conditioning
from lora_trainer.experiments.lr_finder.analysis import Point, analyse
from lora_trainer.experiments.lr_finder.prepare import HIGHEST_LR, FinderOptions, PreparedFinder, prepare_finder
from lora_trainer.experiments.lr_finder.run import Instrument
from lora_trainer.runtime.launch import Launch
from lora_trainer.runtime.runtime import environment_report, start_runtime
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.console import Screen
from lora_trainer.training.setup import Assembly, assemble
from lora_trainer.training.trial import TrialSpec

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "find_lr.json"
GRID = [10 ** (exponent / 2) for exponent in range(-10, -1)]  # 1e-5 to 1e-1
NUM_UPDATES, NUM_FORK_UPDATES, ENOUGH = 100, 50, 0.8
DATA = ["validation={fraction: 0.2, batch_size: 48}", f"output_dir={ROOT / 'build' / 'find-lr'}", "train.threads=1"]
UNLEARNABLE = [*DATA, "adapter.targets=[conv_out, to_v, to_out.0]", "train.batch_size=1", "data.resolution=32"]
NO_SIGNAL_RAMP = FinderOptions(num_updates=40, num_images=2)


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


@contextmanager
def laboratory(overrides: list[str], options: FinderOptions) -> Iterator[tuple[PreparedFinder, Assembly, Any]]:
    """The demo's training, ready to be moved."""
    screen = Screen(silent=True)
    finder = prepare_finder(load_config(ROOT / "configs" / "demo.yaml", overrides), Launch(), options, screen.track)
    prepared = finder.prepared
    with start_runtime(prepared.launch, "fp32", 1) as runtime:
        yield finder, assemble(prepared, [TrialSpec("trial", prepared.config)], runtime, screen), runtime


def evaluate_seed(seed: int, store: Store, *, with_forks: bool) -> None:
    """Ramp, grid, suggestion and forks of one training seed."""
    own = store.content.get("seeds", {}).get(str(seed), {})
    if {"ramp", "suggested_gain"} <= set(own) and len(own["grid"]) == len(GRID) and ("forks" in own or not with_forks):
        return
    with laboratory([*DATA, f"seed={seed}"], FinderOptions()) as (finder, parts, runtime):
        store.get("environment", measure=lambda: environment_report(runtime))
        content = {key: value for key, value in finder.prepared.identity().items() if key.endswith("content")}
        if store.get("content", measure=lambda: content) != content:
            raise SystemExit(f"{store.file} was measured on another base or other images: move it aside")
        instrument = Instrument(parts, runtime.device, lambda: False)

        def gain(lr: float) -> float | None:
            relative_NS = instrument.run_constant(lr, NUM_UPDATES)
            return None if relative_NS is None else float((instrument.start_NS - relative_NS).mean())

        def ramp() -> dict[str, Any]:
            points = [each.point for each in instrument.run_ramp(finder, Screen(silent=True))]
            return {"finding": _reading(points), "usual_rules": usual_rules(points)}

        def forks(suggestion: float) -> dict[str, Any]:
            tried = [Fork(lr, instrument.run_constant(lr, NUM_FORK_UPDATES)) for lr in fork_lrs(suggestion, HIGHEST_LR)]
            verdict = judge_forks(tried, instrument.start_NS)
            return {"lrs": [each.lr for each in tried], "choice": verdict.choice, "reason": verdict.reason}

        place = ("seeds", str(seed))
        suggestion = store.get(*place, "ramp", measure=ramp)["finding"]["suggestion"]
        for lr in GRID:
            store.get(*place, "grid", f"{lr:.2e}", measure=partial(gain, lr))
        store.get(*place, "suggested_gain", measure=lambda: gain(suggestion))
        if with_forks:
            store.get(*place, "forks", measure=lambda: forks(suggestion))


def evaluate_unlearnable(seed: int, store: Store) -> None:
    """The verdict on a denoiser that has nothing to learn."""

    def verdict() -> dict[str, Any]:
        overrides = [*UNLEARNABLE, f"seed={seed}", f"validation.seed={seed}"]
        with laboratory(overrides, NO_SIGNAL_RAMP) as (finder, parts, runtime):
            make_unlearnable(parts)
            instrument = Instrument(parts, runtime.device, lambda: False)
            return _reading([each.point for each in instrument.run_ramp(finder, Screen(silent=True))])

    store.get("unlearnable", str(seed), measure=verdict)


@torch.no_grad()
def make_unlearnable(parts: Assembly) -> None:
    """Show the denoiser other noise than the one it is asked for, and let it start at zero, the best answer then."""
    for parameter in parts.denoiser.conv_out.base_layer.parameters():  # type: ignore[union-attr]
        parameter.zero_()
    predict = parts.family.predict

    def blind(denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, said: Conditioning) -> torch.Tensor:
        keys = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in noisy]
        other = torch.stack(
            [random_streams.normal(image.shape, 0, "unrelated", key) for image, key in zip(noisy, keys, strict=True)]
        )
        return predict(denoiser, other, timesteps, said)

    parts.family.predict = blind  # type: ignore[method-assign, assignment]


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


def _reading(points: list[Point]) -> dict[str, Any]:
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
