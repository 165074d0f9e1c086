"""Calibrate the thresholds of the diagnosis, and judge it on runs that the calibration has not seen.

    python -m benchmarks.evaluation.calibrate_diagnosis --synthetic      # made-up runs alone: a minute
    python -m benchmarks.evaluation.calibrate_diagnosis              # and real runs: 40 minutes on one core; resumes

Writes benchmarks/results/diagnosis.json, whose tables docs/diagnosis.md quotes (printed at the end as Markdown).
Synthetic: 200 runs per state to calibrate on and 200 others to judge (`synthetic_runs.py`). Real: short runs of the
demo base (`diagnosis_runs.py`); even seeds calibrate, odd ones judge. Both judge the thresholds that stand in the code;
`calibration_would_change` names those that the calibrating runs would have otherwise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.evaluation.diagnosis_judgement import Labelled, confusion, markdown
from benchmarks.evaluation.diagnosis_runs import LABORATORIES, SEEDS, runs_of
from benchmarks.evaluation.synthetic_runs import CASES, synthetic_run
from lora_trainer.evidence.diagnosis.diagnose import RULES
from lora_trainer.evidence.diagnosis.findings import State
from lora_trainer.evidence.diagnosis.log import TrialLog
from lora_trainer.evidence.diagnosis.rules import Thresholds
from lora_trainer.runtime.launch import Launch
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.console import MainConsole

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "diagnosis.json"
NUM_SYNTHETIC, JUDGED_FROM = 200, 1000
FACTORS = (1.0, 0.7, 1.4, 0.5, 2.0)
"""What a threshold is tried at, as a multiple of that in the code, the nearest first."""
LEAST_RECALL, MOST_FALSE_ALARMS = 0.95, 0.01
"""Of one state's rule alone: stricter than the goals for all rules together, 0.9 and 0.05."""
TUNED = {
    "diverged_ratio": State.DIVERGED,
    "diverged_rise": State.DIVERGED,
    "oscillation_index": State.OSCILLATING,
    "oscillation_se": State.OSCILLATING,
    "flat_share": State.STAGNANT,
    "flat_rise": State.STAGNANT,
    "cooldown_se": State.LR_NOISE_LIMITED,
    "doubtful_gain": State.NEVER_STARTED,
    "overfit_se": State.OVERFIT,
    "overfit_lost": State.OVERFIT,
    "forgetting_se": State.FORGETTING,
    "forgetting_rise": State.FORGETTING,
    "clipped_share": State.CLIPPING,
    "shock_se": State.RESTART_SHOCK,
    "shock_share": State.RESTART_SHOCK,
}
"""Each threshold with the state whose rule it decides."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", action="store_true", help="leave the real runs as the result file has them")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    limits, console = Thresholds(), MainConsole()
    content: dict[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    calibrating = {"synthetic": synthetic_runs(0, console)}
    judged = {"synthetic": synthetic_runs(JUDGED_FROM, console)}
    if not options.synthetic:
        real = real_runs(console)
        for parity, part in enumerate((calibrating, judged)):
            part["real"] = [each for seed, own in real.items() if seed % 2 == parity for each in own]
        content["environment"] = environment()
    content["thresholds"] = asdict(limits)
    changes = calibrate(calibrating, limits)
    if not options.synthetic:  # both kinds of runs have a say in what is recorded
        content["calibration_would_change"] = changes
    for kind, runs in judged.items():
        content[kind] = confusion(runs, limits)
        content[f"{kind}_calibrating"] = confusion(calibrating[kind], limits)
    atomic_files.write_json(options.output, content)
    for kind in ("synthetic", "real"):
        if kind in content:
            console.print(f"\n{kind} runs, judged\n\n{markdown(content[kind])}")
    console.print(f"\ncalibration would change: {changes or 'nothing'}")


def synthetic_runs(first_seed: int, console: MainConsole) -> list[Labelled]:
    """200 made-up runs of each state."""
    seeds = [(state, seed) for state in CASES for seed in range(first_seed, first_seed + NUM_SYNTHETIC)]
    return [
        Labelled(str(state), frozenset({state}), *synthetic_run(state, seed))
        for state, seed in console.track(seeds, f"making runs from seed {first_seed}", len(seeds))
    ]


def real_runs(console: MainConsole) -> dict[int, list[Labelled]]:
    """All arms of all laboratories, by seed; trained where they were not yet."""
    todo = [(laboratory, seed) for seed in SEEDS for laboratory in LABORATORIES]
    runs: dict[int, list[Labelled]] = {}
    for laboratory, seed in console.track(todo, "training", len(todo)):
        runs.setdefault(seed, []).extend(runs_of(laboratory, seed))
    return runs


def environment() -> dict[str, Any]:
    """Hardware and versions, of the real runs."""
    from lora_trainer.runtime.runtime import environment_report, start_runtime

    with start_runtime(Launch(), "fp32", 1) as runtime:
        return environment_report(runtime)


def calibrate(pools: Mapping[str, Sequence[Labelled]], limits: Thresholds) -> dict[str, float]:
    """Thresholds to change, one at a time: the nearest value at which every pool of runs meets both goals.

    Where none does, the one that misses them by least. A threshold that meets them stays as it is.
    """
    changes = {}
    logs = [[(each, each.log) for each in pool] for pool in pools.values()]
    for name, state in TUNED.items():
        misses = {}
        for factor in FACTORS:
            tried = replace(limits, **{name: getattr(limits, name) * factor})
            misses[factor] = sum(_miss(pool, state, tried) for pool in logs)
        best = min(FACTORS, key=lambda factor: misses[factor])
        if best != 1:
            changes[name] = getattr(limits, name) * best
    return changes


def _miss(pool: Sequence[tuple[Labelled, TrialLog]], state: State, limits: Thresholds) -> float:
    """By how much a state's rule misses its recall and its false alarms in a pool, false alarms counted fivefold."""

    def fires(each: Labelled, log: TrialLog, *rules: State) -> bool:
        return any(RULES[rule](log, each.run, limits).status == "found" for rule in rules)

    alarms = [fires(each, log, state) for each, log in pool if each.is_healthy]
    hits = [fires(each, log, *each.expected) for each, log in pool if state in each.expected]
    missed = max(0.0, LEAST_RECALL - sum(hits) / len(hits)) if hits else 0.0
    return missed + 5 * max(0.0, sum(alarms) / max(1, len(alarms)) - MOST_FALSE_ALARMS)


if __name__ == "__main__":
    main()
