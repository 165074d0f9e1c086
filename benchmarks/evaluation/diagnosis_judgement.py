"""How often the diagnosis is right about runs whose state is known: confusion tables, false alarms, their Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lora_trainer.evidence.diagnosis.diagnose import diagnose
from lora_trainer.evidence.diagnosis.findings import State
from lora_trainer.evidence.diagnosis.log import RunFacts, TrialLog
from lora_trainer.evidence.diagnosis.rules import Thresholds

Row = dict[str, Any]
Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A run of one trial, how it was made, and what should be found in it."""

    label: str
    expected: frozenset[State]
    """Any of these is right; every other fault is wrong."""
    rows: Sequence[Row]
    run: RunFacts

    @property
    def is_healthy(self) -> bool:
        return not any(state.is_fault for state in self.expected)

    @property
    def log(self) -> TrialLog:
        """All of it, as it stands when the run is over."""
        *_, whole = self.logs_at_probes()
        return whole

    def logs_at_probes(self) -> Iterator[TrialLog]:
        """The growing log whenever the trainer would look at it: after the probes of a step, and at the end."""
        log = TrialLog()
        for row, following in pairwise([*self.rows, {}]):
            log.add(row)
            if not following or (row.get("event") == "validation" and following.get("event") != "validation"):
                yield log


def confusion(runs: Sequence[Labelled], limits: Thresholds) -> Table:
    """Per label: number of runs, in how many an expected state was found, and all that was found; the sums.

    A healthy run counts as a false alarm where a fault stands in its last diagnosis; `ever_alarmed` where one stood in
    any that it printed on its way.
    """
    labels: dict[str, Table] = {}
    sums = Counter[str]()
    for each in runs:
        row = labels.setdefault(
            each.label, {"expected": sorted(map(str, each.expected)), "runs": 0, "right": 0, "found": Counter[str]()}
        )
        diagnosis = diagnose(each.log, each.run, limits)
        right = not diagnosis.faults if each.is_healthy else bool(each.expected & {f.state for f in diagnosis.found})
        row["runs"] += 1
        row["right"] += right
        row["found"].update(diagnosis.verdict)
        if each.is_healthy:
            sums.update(healthy_runs=1, false_alarms=not right, ever_alarmed=was_ever_alarmed(each, limits))
        else:
            sums.update(faulty_runs=1, found=right)
    return {
        **dict(sums),
        "labels": {name: row | {"found": dict(row["found"].most_common())} for name, row in labels.items()},
    }


def was_ever_alarmed(each: Labelled, limits: Thresholds) -> bool:
    """Whether a fault was told at any probe of the run."""
    return any(diagnose(log, each.run, limits).faults for log in each.logs_at_probes())


def markdown(table: Table) -> str:
    """A confusion table as docs/diagnosis.md shows it."""
    lines = ["| made as | right answer | runs | right | all that was found |", "|---|---|---|---|---|"]
    for label, row in table["labels"].items():
        found = ", ".join(f"{state} {count}" for state, count in row["found"].items())
        lines.append(f"| {label} | {' or '.join(row['expected'])} | {row['runs']} | {row['right']} | {found} |")
    return "\n".join([*lines, "", sentence(table)])


def sentence(table: Table) -> str:
    """The sums of a confusion table in words."""
    return (
        f"Faults found: {_share(table['found'], table['faulty_runs'])}. "
        f"False alarms at the end of a healthy run: {_share(table['false_alarms'], table['healthy_runs'])}; "
        f"at any probe on its way: {_share(table['ever_alarmed'], table['healthy_runs'])}."
    )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / max(1, whole):.1%})"
