"""`lora-trainer diagnose`: judge a stored run by its log. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_trainer.config.places import CONFIG_FILE, METRICS_FILE
from lora_trainer.errors import ExitCode
from lora_trainer.evidence.diagnosis.diagnose import Diagnosis, EarlyReport, diagnose, early_report, finding_lines
from lora_trainer.evidence.diagnosis.findings import Status
from lora_trainer.evidence.diagnosis.log import RunFacts, read_run
from lora_trainer.storage.atomic_files import to_json
from lora_trainer.tracking.console import Screen
from lora_trainer.tracking.metrics import damage_note, finite


def diagnose_run(run_dir: Path, *, as_json: bool, check: bool) -> ExitCode:
    """Print what the log of a run shows; whether a fault was found is the exit code where `check` asks for it.

    Raises:
        ConfigError: the folder holds no run.
    """
    log, run = read_run(run_dir)
    diagnosis, early = diagnose(log, run), early_report(log, run)
    screen = Screen()
    if as_json:
        trial = _as_json(diagnosis, early)
        content = {"run": str(run_dir), "damaged_lines": log.num_damaged, "trials": [trial]}
        screen.say(to_json(finite(content)).decode().rstrip())
    else:
        if log.num_damaged:
            screen.say(damage_note(str(run_dir / METRICS_FILE), log.num_damaged))
        for line in _lines(diagnosis, early, run, run_dir):
            screen.say(line)
    return ExitCode.FAULT_FOUND if check and diagnosis.faults else ExitCode.DONE


def _as_json(diagnosis: Diagnosis, early: EarlyReport | None) -> dict[str, Any]:
    return diagnosis.as_json() | {"early_report": None if early is None else {"step": early.step} | early.as_event()}


def _lines(diagnosis: Diagnosis, early: EarlyReport | None, run: RunFacts, run_dir: Path) -> Iterator[str]:
    yield f"Diagnosis of {diagnosis.trial} at step {diagnosis.step} of {run.num_updates}"
    for finding in diagnosis.found:
        yield from finding_lines(finding)
    overrides = [advice.override for finding in diagnosis.faults for advice in finding.advice if advice.override]
    if overrides:
        again = f"lora-trainer train -c {run_dir / CONFIG_FILE} name={run.config.name}-2"
        yield f"\nOne change at a time; the first would be\n  {again} '{overrides[0]}'"
    if early is not None:
        yield f"\nEarly report, step {early.step}"
        yield from (f"  {sentence}" for sentence in early.sentences)
    yield from _listed(diagnosis, "not found", "\nLooked for and not found")
    yield from _listed(diagnosis, "not measured", "\nNot measured")


def _listed(diagnosis: Diagnosis, status: Status, title: str) -> Iterator[str]:
    findings = [finding for finding in diagnosis.findings if finding.status == status]
    if findings:
        yield title
        yield from (f"  {finding.state:<18} {finding.evidence}" for finding in findings)
