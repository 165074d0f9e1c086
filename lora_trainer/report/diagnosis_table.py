"""What the diagnosis said of each run, from the events in its log: the last one told stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_trainer.report.comparison import ArmRuns
from lora_trainer.report.figure import Table
from lora_trainer.report.run_record import Row, RunRecord

NOT_MEASURED = "not measured"


def diagnosis_table(groups: Sequence[ArmRuns]) -> Table | None:
    """A row per state found; None where no run's log holds a diagnosis."""
    runs = [(group.name_of(run), run) for group in groups for run in group.runs]
    if not any(_was_diagnosed(run) for _, run in runs):
        return None
    rows = tuple((name, *cells) for name, run in runs for cells in _run_rows(run))
    return Table("Diagnosis at its last change", ("run", "state", "confidence", "evidence", "to try"), rows)


def _was_diagnosed(run: RunRecord) -> bool:
    return any(row["event"] in ("diagnosis", "early_report") for row in run.events)


def _run_rows(run: RunRecord) -> Iterator[tuple[str, ...]]:
    told = [row for row in run.events if row["event"] == "diagnosis"]
    if told:
        for finding in told[-1]["findings"]:
            yield (
                finding["state"],
                finding["confidence"] or "–",
                f"step {told[-1]['step']}: {finding['evidence']}",
                _advice(finding),
            )
    elif _was_diagnosed(run):
        yield "no fault told", "–", "the diagnosis followed the run and had nothing to say", "–"
    else:
        yield NOT_MEASURED, "–", "the log holds no diagnosis", "lora-trainer diagnose"


def _advice(finding: Row) -> str:
    """Each advice with its setting, where it is one."""
    told = [
        advice["text"] + (f" ({advice['key']}: {advice['value']})" if "key" in advice else "")
        for advice in finding["advice"]
    ]
    return "; ".join(told) or "–"
