"""Read a run directory for its diagnosis: settings, length and log."""

from __future__ import annotations

import json
from pathlib import Path

from lora_trainer.config.load import load_config
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.evidence.diagnosis.run_facts import RunFacts
from lora_trainer.evidence.diagnosis.trial_log import RunLog
from lora_trainer.planning.run_plan import RunPlan
from lora_trainer.tracking.metrics import read_lines

METRICS, PLAN, CONFIG = "metrics.jsonl", "plan.json", "config.yaml"


def read_run(run_dir: Path) -> tuple[RunLog, RunFacts]:
    """The log and the facts of a stored run, finished or not.

    Raises:
        ConfigError: the folder holds no run; all missing files are named.
    """
    missing = [name for name in (METRICS, PLAN, CONFIG) if not (run_dir / name).is_file()]
    if missing:
        fix = "give the folder that `lora-trainer train` wrote: <output_dir>/<name>"
        raise ConfigError(*(Problem(f"there is no {name}", str(run_dir), fix=fix) for name in missing))
    log = RunLog()
    for row in read_lines(run_dir / METRICS):
        log.add(row)
    config = load_config(run_dir / CONFIG)
    log.expect(config.name)
    plan = RunPlan.from_json(json.loads((run_dir / PLAN).read_text(encoding="utf-8")))
    return log, RunFacts.of(plan, config)
