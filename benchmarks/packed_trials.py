"""What does packing gain? K trials in one forward against the same K one after the other, paired, in one process.

    python benchmarks/packed_trials.py              # writes benchmarks/results/packed_trials-<device>.json

Both arms run the same updates of the same trials on the demo base and take turns, so that the machine's drift hits both
alike; the ratio is the median over the pairs. Memory is the highest of a process that runs one arm alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_trainer.training.setup import Assembly

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCHES, TRIALS = (1, 4), (1, 2, 6, 18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", default="", help="What else ran on the machine, for the record.")
    options = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        for batch in BATCHES:
            for num_trials in TRIALS:
                case = in_child(compare, scratch, batch, num_trials, options.rounds)
                for arm, per_pass in (("packed", num_trials), ("sequential", 1)):
                    memory = in_child(peak_memory, scratch, batch, num_trials, per_pass)
                    case[arm]["peak_memory_gib"] = memory
                cases.append(case)
                print(json.dumps(case), flush=True)
        environment = in_child(environment_of, scratch)
    device = "gpu" if "NVIDIA" in environment["device"] else "cpu"
    result = {
        "what": "LoRA rank 8 on transformer+resnet of the demo base, fp32, AdamW; one update of all trials",
        "environment": environment,
        "load_of_the_machine": {"note": options.note, "average_1_min": round(os.getloadavg()[0], 2)},
        "cases": cases,
    }
    file = ROOT / "benchmarks" / "results" / f"packed_trials-{device}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")


def compare(scratch: str, batch: int, num_trials: int, rounds: int) -> dict[str, Any]:
    """Seconds per update of all trials in both arms, in turns, and the ratio of the pairs."""
    from lora_trainer.training.trial import passes_of

    seconds: dict[str, list[float]] = {"packed": [], "sequential": []}
    with assembled(scratch, batch, num_trials) as parts:
        for number in range(rounds + 1):
            for arm, per_pass in (("packed", num_trials), ("sequential", 1)):
                parts.updater.pack(passes_of(parts.trials, per_pass))
                started = time.perf_counter()
                parts.updater.run(number, number, stop_asked=False)
                if number:  # the first round warms up
                    seconds[arm].append(time.perf_counter() - started)
    ratios = [one / other for one, other in zip(seconds["sequential"], seconds["packed"], strict=True)]
    return {
        "batch_size": batch,
        "trials": num_trials,
        "packed": {"seconds_per_update": summary(seconds["packed"])},
        "sequential": {"seconds_per_update": summary(seconds["sequential"])},
        "times_as_fast": summary(ratios),
    }


def peak_memory(scratch: str, batch: int, num_trials: int, per_pass: int) -> float:
    from lora_trainer.training.trial import passes_of

    with assembled(scratch, batch, num_trials) as parts:
        parts.updater.pack(passes_of(parts.trials, per_pass))
        for number in range(3):
            parts.updater.run(number, number, stop_asked=False)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def environment_of(scratch: str) -> dict[str, Any]:
    from lora_trainer.runtime.runtime import environment_report, start_runtime

    prepared = prepared_run(scratch, 1)
    with start_runtime(prepared.launch, "fp32", prepared.threads) as runtime:
        return environment_report(runtime)


@contextmanager
def assembled(scratch: str, batch: int, num_trials: int) -> Iterator[Assembly]:
    """Trials at as many learning rates on the demo base."""
    from lora_trainer.runtime.runtime import start_runtime
    from lora_trainer.tracking.console import Screen
    from lora_trainer.training.setup import assemble
    from lora_trainer.training.trial import TrialSpec

    prepared = prepared_run(scratch, batch)
    config = prepared.config
    specs = [
        TrialSpec(f"t{k}", config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": lr})}))
        for k, lr in enumerate(1e-4 * 1.2**k for k in range(num_trials))
    ]
    with start_runtime(prepared.launch, "fp32", prepared.threads) as runtime:
        yield assemble(prepared, specs, runtime, Screen(silent=True), drop_failed=True)


def prepared_run(scratch: str, batch: int) -> Any:
    from lora_trainer.config.load import load_config
    from lora_trainer.planning.prepare import prepare
    from lora_trainer.runtime.launch import read_launch

    overrides = [
        f"output_dir={scratch}",
        f"model.path={ROOT / 'demo/base'}",
        f"data.dir={ROOT / 'demo/images'}",
        f"train.batch_size={batch}",
        "tracking.base_loss_every=null",
    ]
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    return prepare(config, read_launch(config), lambda items, *_: items)


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def in_child(function: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    main()
