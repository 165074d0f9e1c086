"""`lora-trainer report` and `diagnose`: what the folders of runs show, on a page or in words. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_trainer.cli.session import check_output
from lora_trainer.config.places import CONFIG_FILE, METRICS_FILE, REPORT_FILE
from lora_trainer.errors import ExitCode
from lora_trainer.evidence.diagnosis.diagnose import Diagnosis, EarlyReport, diagnose, early_report, finding_lines
from lora_trainer.evidence.diagnosis.log import RunFacts, read_run
from lora_trainer.evidence.statistics.verdict import Rules
from lora_trainer.report.page import GENERATOR, write_report
from lora_trainer.tracking.console import MainConsole
from lora_trainer.tracking.metrics import damage_note, finite


def report(runs: Sequence[Path], output: Path | None, min_effect: float, confirm: Sequence[Path] = ()) -> None:
    """Write the page and say its sentence; of one run into its directory, of several where we are.

    Args:
        confirm: runs of the leaders on fresh seeds.

    Raises:
        ConfigError: a folder is no run directory, runs do not go together, or the page would replace another's file.
    """
    file = output or (runs[0] if len(runs) == 1 else Path()) / REPORT_FILE
    check_output(file, lambda there: GENERATOR.encode() in there.open("rb").read(2**20))
    MainConsole().aside("drawing the page")
    sentence = write_report(runs, file, confirm=confirm, rules=Rules(min_effect=min_effect))
    MainConsole().print(f"{sentence}\n\nwrote {file}")


def diagnose_run(run_dir: Path, *, as_json: bool, check: bool) -> ExitCode:
    """Print what the log of a run shows; whether a fault was found is the exit code where `check` asks for it.

    Raises:
        ConfigError: the folder holds no run.
    """
    log, run = read_run(run_dir)
    diagnosis, early = diagnose(log, run), early_report(log, run)
    console = MainConsole()
    if as_json:
        first = None if early is None else {"step": early.step} | early.as_event()
        trials = [diagnosis.as_json() | {"early_report": first}]
        content = {"run": str(run_dir), "damaged_lines": log.num_damaged, "trials": trials}
        console.print(json.dumps(finite(content), indent=2, sort_keys=True))
    else:
        if log.num_damaged:
            console.print(damage_note(str(run_dir / METRICS_FILE), log.num_damaged))
        for line in _lines(diagnosis, early, run, run_dir):
            console.print(line)
    return ExitCode.FAULT_FOUND if check and diagnosis.faults else ExitCode.DONE


def _lines(diagnosis: Diagnosis, early: EarlyReport | None, run: RunFacts, run_dir: Path) -> Iterator[str]:
    yield f"Diagnosis of {diagnosis.trial} at step {diagnosis.step} of {run.num_steps}"
    for finding in diagnosis.found:
        yield from finding_lines(finding)
    overrides = [advice.override for finding in diagnosis.faults for advice in finding.advice if advice.override]
    if overrides:
        again = f"lora-trainer train -c {run_dir / CONFIG_FILE} name={run.config.name}-2"
        yield f"\nOne change at a time; the first would be\n  {again} '{overrides[0]}'"
    if early is not None:
        yield f"\nEarly report, step {early.step}"
        yield from (f"  {sentence}" for sentence in early.sentences)
    for status, title in {"not found": "Looked for and not found", "not measured": "Not measured"}.items():
        if findings := [finding for finding in diagnosis.findings if finding.status == status]:
            yield f"\n{title}"
            yield from (f"  {finding.state:<18} {finding.evidence}" for finding in findings)
