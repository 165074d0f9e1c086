"""What the five-seed demo sweep showed, in one file: verdicts, losses, and two questions about constant LRs and halves.

    scripts/demo_sweep --full                               # 90 trials; half an hour on one core; resumes
    python -m benchmarks.evaluation.summarise_full_sweep runs/demo-sweep-full [--confirm runs/demo-sweep-full-confirm]

Writes benchmarks/results/demo_sweep_full.json, from the sweep's record and logs alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_trainer.evidence.statistics.paired import paired
from lora_trainer.evidence.statistics.verdict import Question, Verdict, confirming, judge, questions
from lora_trainer.report.runs import ArmRuns, RunRecord, arms, read_runs
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.console import Screen

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "demo_sweep_full.json"
DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial-power2")
FLAT = "constant"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--confirm", type=Path)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    records = read_runs([options.sweep])
    assert all(record.is_finished for record in records), "the sweep is not finished"
    groups = arms(records)
    found = [judge(question) for question in questions([_arm(group) for group in groups])]
    content: dict[str, Any] = {
        "command": "scripts/demo_sweep --full",
        "trials": len(records),
        "environment": records[0].environment,
        "held_out_loss_relative_to_the_base": {group.name: losses(group) for group in groups},
        "verdicts": {verdict.question.label: verdict.sentence for verdict in found},
        "decaying_against_constant": against_constant(groups),
        "the_best_schedule_at_half_time_was_the_best_at_the_end": half_times(groups),
    }
    if options.confirm is not None:
        fresh = arms(read_runs([options.confirm], "confirmation"))
        verdict = confirmation(fresh)
        content["confirmation"] = {
            "held_out_loss_relative_to_the_base": {group.name: losses(group) for group in fresh},
            "verdict": verdict.sentence,
        }
    atomic_files.write_json(options.output, content)
    Screen().say(json.dumps({key: value for key, value in content.items() if key != "environment"}, indent=2))


def _arm(group: ArmRuns) -> Any:
    return group.as_arm(group.runs[0].purpose)


def confirmation(groups: Sequence[ArmRuns]) -> Verdict:
    question: Question = confirming([_arm(group) for group in groups])
    return judge(question, purpose="confirmation")


def losses(group: ArmRuns) -> dict[int, float]:
    """Held-out loss at the end by seed."""
    return {run.seed: _relative(run, run.num_updates) for run in group.runs}


def against_constant(groups: Sequence[ArmRuns]) -> dict[str, Any]:
    """At each peak LR: in how many seeds a decaying schedule ended below the constant one, and by how much."""
    by_place = {(group.setting, group.peak_lr): losses(group) for group in groups}
    table: dict[str, Any] = {}
    for lr in sorted({lr for _, lr in by_place}):
        flat = by_place[FLAT, lr]
        for schedule in DECAYING:
            gains = [flat[seed] - loss for seed, loss in by_place[schedule, lr].items()]
            test = paired(gains)
            table.setdefault(f"{lr:g}", {})[schedule] = {
                "seeds_won": sum(gain > 0 for gain in gains),
                "of": len(gains),
                "mean_gain": test.mean,
                "interval_of_this_pair_alone": test.interval(),
            }
    return table


def half_times(groups: Sequence[ArmRuns]) -> dict[str, Any]:
    """At each peak LR: in how many seeds the best of all schedules at half-time was the best at the end."""
    table: dict[str, Any] = {}
    for lr in sorted({group.peak_lr for group in groups}):
        runs = [run for group in groups if group.peak_lr == lr for run in group.runs]
        by_seed = {seed: [run for run in runs if run.seed == seed] for seed in sorted({run.seed for run in runs})}
        kept = sum(_best(own, half=True) is _best(own, half=False) for own in by_seed.values())
        table[f"{lr:g}"] = {"seeds": len(by_seed), "kept": kept}
    return table


def _best(runs: Sequence[RunRecord], *, half: bool) -> RunRecord:
    return min(runs, key=lambda run: _relative(run, run.num_updates // (2 if half else 1)))


def _relative(run: RunRecord, step: int) -> float:
    """The held-out loss after this many updates."""
    return next(float(row["relative"]) for row in run.probe() if row["step"] == step)


if __name__ == "__main__":
    main()
