"""How fast are a training step and a whole run against a plain diffusers loop? Paired, in one process.

    python benchmarks/step_speed.py                 # writes benchmarks/results/step_speed-<device>.json

The arms take turns, twenty steps each, so that the machine's drift hits all alike; ratios are of the medians of the
pairs. Before anything is timed, the losses of the first ten steps must agree.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ROUNDS, STEPS_PER_TURN, WHOLE_RUN = 9, 20, 300
BATCH = 5  # of configs/demo.yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # first, as a child counts the highest memory of its parent as its own
        memory = {name: in_child(peak_memory, scratch, name) for name in ("ours", "cached", "loop")}
        result = compare(Path(scratch), options.rounds) | {"peak_memory_gib": memory}
        result["seconds"] = {"--help": command_seconds("--help"), "start to first step": first_step_seconds(scratch)}
    device = "cpu" if result["environment"]["device"].find("NVIDIA") < 0 else "gpu"
    file = ROOT / "benchmarks" / "results" / f"step_speed-{device}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def compare(scratch: Path, rounds: int) -> dict[str, Any]:
    """Check that the arms agree, then time them in turns, then time whole runs."""
    from benchmarks.arms import Arm, Ours, Plain
    from lora_trainer.runtime.launch import Launch
    from lora_trainer.runtime.runtime import environment_report, start_runtime

    prepared = prepared_run(scratch)
    with start_runtime(Launch(), "fp32", prepared.threads) as runtime:
        arms: list[Arm] = [
            Ours(prepared, runtime),
            Plain(prepared, runtime.device, cached=True),
            Plain(prepared, runtime.device, cached=False),
        ]
        losses = [[arm.step(number) for number in range(10)] for arm in arms]
        disagreement = max(abs(a - b) / b for row in losses[1:] for a, b in zip(losses[0], row, strict=True))
        assert disagreement < 1e-3, f"the arms do not train the same thing: {disagreement}"
        seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for turn in range(rounds):
            for arm in arms:
                started = time.perf_counter()
                for number in range(STEPS_PER_TURN):
                    arm.step(10 + turn * STEPS_PER_TURN + number)
                seconds[arm.name].append((time.perf_counter() - started) / STEPS_PER_TURN)
        whole = {
            "ours": timed(lambda: whole_run(Ours(prepared_run(scratch / "cold"), runtime))),
            "diffusers style, encoders in the loop": timed(
                lambda: whole_run(Plain(prepared, runtime.device, cached=False))
            ),
        }
        return {
            "what": "demo config: batch 5, rank 8 on transformer+resnet, fp32, without tracking.base_loss_every",
            "environment": environment_report(runtime),
            "largest_relative_difference_of_losses": disagreement,
            "seconds_per_step": {name: summary(values) for name, values in seconds.items()},
            "images_per_s": {name: round(BATCH / statistics.median(values), 2) for name, values in seconds.items()},
            "times_as_fast_as": {
                name: summary([theirs / ours for theirs, ours in zip(values, seconds["ours"], strict=True)])
                for name, values in seconds.items()
                if name != "ours"
            },
            f"whole_{WHOLE_RUN}_step_run_s": {name: round(value, 2) for name, value in whole.items()},
            "whole_run_times_as_fast": round(whole["diffusers style, encoders in the loop"] / whole["ours"], 2),
        }


def prepared_run(scratch: Path) -> Any:
    from lora_trainer.config.load import load_config
    from lora_trainer.planning.prepare import prepare
    from lora_trainer.runtime.launch import Launch

    overrides = [f"output_dir={scratch}", f"model.path={ROOT / 'demo/base'}", f"data.dir={ROOT / 'demo/images'}"]
    overrides += ["tracking.base_loss_every=null", "data.captions.dropout=0"]  # what the plain loops do not do
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    return prepare(config, Launch(), lambda items, *_: items)


def whole_run(arm: Any) -> None:
    for number in range(WHOLE_RUN):
        arm.step(number)


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def peak_memory(scratch: str, name: str) -> float:
    """Highest memory of a process that trains twenty steps with one arm."""
    from benchmarks.arms import Arm, Ours, Plain
    from lora_trainer.runtime.launch import Launch
    from lora_trainer.runtime.runtime import start_runtime

    prepared = prepared_run(Path(scratch))
    with start_runtime(Launch(), "fp32", prepared.threads) as runtime:
        arm: Arm = (
            Ours(prepared, runtime) if name == "ours" else Plain(prepared, runtime.device, cached=name == "cached")
        )
        for number in range(20):
            arm.step(number)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def in_child(function: Callable[..., float], *arguments: str) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def command_seconds(*arguments: str) -> float:
    """Median wall time of the program over five starts."""
    command = [sys.executable, "-m", "lora_trainer", *arguments]
    run = lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # noqa: E731
    return round(statistics.median(timed(run) for _ in range(5)), 3)


def first_step_seconds(scratch: str) -> float:
    """From the start of the process to the line of the first step, with warm caches."""
    command = [
        sys.executable,
        "train.py",
        "--config",
        "configs/demo.yaml",
        f"output_dir={scratch}",
        "sample.prompts=[]",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "sample.every_steps=null"], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=None
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    seconds = time.perf_counter() - started
    process.kill()
    process.wait()
    return round(seconds, 2)


if __name__ == "__main__":
    main()
