"""The diagnosis as it was judged: docs/diagnosis.md quotes benchmarks/results/diagnosis.json, and the goals are met."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.evaluation.diagnosis_judgement import Labelled, confusion, markdown
from benchmarks.evaluation.synthetic_runs import CASES, synthetic_run
from lora_trainer.evidence.diagnosis.findings import State
from lora_trainer.evidence.diagnosis.rules import Thresholds

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "diagnosis.md").read_text()
RESULT = json.loads((ROOT / "benchmarks" / "results" / "diagnosis.json").read_text())


def labelled(state: State, seed: int, expected: State | None = None) -> Labelled:
    return Labelled(str(state), frozenset({expected or state}), *synthetic_run(state, seed))


@pytest.mark.parametrize("kind", ["synthetic", "real"])
def test_the_page_quotes_the_tables_of_the_result(kind: str) -> None:
    assert markdown(RESULT[kind]) in DOC


@pytest.mark.parametrize("kind", ["synthetic", "real"])
def test_what_was_judged_meets_the_goals(kind: str) -> None:
    table = RESULT[kind]
    assert table["found"] >= 0.9 * table["faulty_runs"]
    assert table["false_alarms"] <= 0.05 * table["healthy_runs"]
    assert table["ever_alarmed"] <= 0.05 * table["healthy_runs"]


def test_sixty_real_runs_of_each_kind_were_made_and_200_made_up_ones_of_each_state() -> None:
    for kind in ("healthy_runs", "faulty_runs"):
        assert RESULT["real"][kind] + RESULT["real_calibrating"][kind] >= 60
    for part in ("synthetic", "synthetic_calibrating"):
        assert {row["runs"] for row in RESULT[part]["labels"].values()} == {200}
        assert set(RESULT[part]["labels"]) == set(map(str, State))


def test_it_was_these_thresholds_that_were_judged() -> None:
    assert RESULT["thresholds"] == asdict(Thresholds())


def test_the_judgement_in_short() -> None:
    """Twenty made-up runs per state, with seeds that took part in nothing else."""
    table = confusion([labelled(state, seed) for state in CASES for seed in range(7000, 7020)], Thresholds())
    assert table["found"] >= 0.9 * table["faulty_runs"] == 0.9 * 200
    assert table["ever_alarmed"] <= 0.05 * table["healthy_runs"] == 0.05 * 40


def test_a_confusion_table_counts_what_is_right_and_what_is_not() -> None:
    runs = [
        labelled(State.HEALTHY, 1),
        labelled(State.DIVERGED, 1, expected=State.HEALTHY),
        labelled(State.CLIPPING, 1),
        labelled(State.CLIPPING, 2, expected=State.OVERFIT),
    ]
    table = confusion(runs, Thresholds())
    assert {key: value for key, value in table.items() if key != "labels"} == {
        "healthy_runs": 2,
        "false_alarms": 1,
        "ever_alarmed": 1,
        "faulty_runs": 2,
        "found": 1,
    }
    assert table["labels"]["clipping"] | {"found": None} == {
        "expected": ["clipping"], "runs": 2, "right": 1, "found": None
    }  # fmt: skip
    assert "Faults found: 1 of 2 (50.0%)" in markdown(table)
