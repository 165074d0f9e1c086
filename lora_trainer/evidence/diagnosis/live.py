"""The diagnosis of a run that is going on, as events of its log.

It reads what the log holds and nothing else, so that a run that was killed and resumed says what any other says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer.evidence.diagnosis.diagnose import Diagnosis, diagnose
from lora_trainer.evidence.diagnosis.early import EarlyReport, early_report
from lora_trainer.evidence.diagnosis.finding import Finding
from lora_trainer.evidence.diagnosis.run_facts import RunFacts
from lora_trainer.evidence.diagnosis.trial_log import RunLog, TrialLog
from lora_trainer.tracking.metrics import parse_row


@dataclass(frozen=True, slots=True)
class Note:
    """An event for the log and the lines for the console."""

    event: str
    trial: str
    content: dict[str, Any]
    lines: tuple[str, ...]


class LiveDiagnosis:
    """Follows a growing `metrics.jsonl`."""

    def __init__(self, metrics: Path, runs: Mapping[str, RunFacts]) -> None:
        """`runs`: the facts of each trial, by its name."""
        self._metrics, self._runs, self._log, self._read = metrics, runs, RunLog(list(runs)), 0
        self._catch_up()

    @property
    def num_damaged(self) -> int:
        """Lines read so far that hold no row; they are left out."""
        return self._log.num_damaged

    def look(self) -> Iterator[Note]:
        """Read the new rows; what has changed about each trial. Each note must be logged before the next look."""
        self._catch_up()
        for name, run in self._runs.items():
            log = self._log.trials[name]
            early = None if log.early_reported else early_report(log, run)
            if early is not None:
                yield _early_note(name, early)
            diagnosis = diagnose(log, run)
            if _is_news(diagnosis, log):
                yield _verdict_note(diagnosis)

    def _catch_up(self) -> None:
        with self._metrics.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._log.add(parse_row(line))
                self._read += len(line)


def _is_news(diagnosis: Diagnosis, log: TrialLog) -> bool:
    """Whether the verdict differs from the last one told; that all is well goes without saying at first."""
    return diagnosis.verdict != log.verdict and (bool(log.verdict) or diagnosis.verdict != ("healthy",))


def _early_note(trial: str, report: EarlyReport) -> Note:
    lines = (f"early report of {trial} at step {report.step}: {'; '.join(report.sentences)}",)
    return Note("early_report", trial, report.as_event(), lines)


def _verdict_note(diagnosis: Diagnosis) -> Note:
    lines = [line for finding in diagnosis.found for line in finding_lines(finding)]
    content = {"findings": [finding.as_json() for finding in diagnosis.found]}
    return Note(
        "diagnosis", diagnosis.trial, content, (f"diagnosis of {diagnosis.trial} at step {diagnosis.step}:", *lines)
    )


def finding_lines(finding: Finding) -> Iterator[str]:
    """A state that was found, its evidence, and what to try."""
    yield f"  {finding.state} ({finding.confidence} confidence): {finding.evidence}"
    for advice in finding.advice:
        yield f"    try: {advice.text}" + (f"  ->  {advice.override}" if advice.override else "")
