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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_trainer.planning.prepare import Prepared
    from lora_trainer.training.setup import Setup

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
    with ready_to_train(scratch, batch, num_trials) as setup:
        for number in range(rounds + 1):
            for arm, per_pass in (("packed", num_trials), ("sequential", 1)):
                setup.optimizer_step.pack(passes_of(setup.trials, per_pass))
                started = time.perf_counter()
                setup.optimizer_step.run(number, stop_asked=False)
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

    with ready_to_train(scratch, batch, num_trials) as setup:
        setup.optimizer_step.pack(passes_of(setup.trials, per_pass))
        for number in range(3):
            setup.optimizer_step.run(number, stop_asked=False)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def environment_of(scratch: str) -> dict[str, Any]:
    from lora_trainer.runtime.launch import Launch
    from lora_trainer.runtime.runtime import environment_report, start_runtime

    prepared = prepared_run(scratch, 1)
    with start_runtime(Launch(), "fp32", prepared.threads) as runtime:
        return environment_report(runtime)


@contextmanager
def ready_to_train(scratch: str, batch: int, num_trials: int) -> Iterator[Setup]:
    """Trials at as many learning rates on the demo base."""
    from lora_trainer.config.trials import TrialConfig
    from lora_trainer.runtime.launch import Launch
    from lora_trainer.runtime.runtime import start_runtime
    from lora_trainer.tracking.console import MainConsole
    from lora_trainer.training.group import Member, TrialGroup
    from lora_trainer.training.setup import set_up

    prepared = prepared_run(scratch, batch)

    def member(name: str, lr: float) -> Member:
        optimizer = prepared.config.optimizer.model_copy(update={"lr": lr})
        config = prepared.config.model_copy(update={"name": name, "optimizer": optimizer})
        return Member(TrialConfig(name, name, {}, config), replace(prepared, config=config))

    members = tuple(member(f"t{k}", 1e-4 * 1.2**k) for k in range(num_trials))
    with start_runtime(Launch(), "fp32", prepared.threads) as runtime:
        group = TrialGroup("benchmark", Path(scratch), members)
        yield set_up(group, runtime, MainConsole(silent=True), trials_per_pass=1)


def prepared_run(scratch: str, batch: int) -> Prepared:
    from lora_trainer.config.load import load_config
    from lora_trainer.planning.prepare import prepare
    from lora_trainer.runtime.launch import Launch

    overrides = [
        f"output_dir={scratch}",
        f"model.path={ROOT / 'demo/base'}",
        f"data.dir={ROOT / 'demo/images'}",
        f"train.batch_size={batch}",
        "tracking.base_loss_every=null",
    ]
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    return prepare(config, Launch(), lambda items, *_: items)


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
