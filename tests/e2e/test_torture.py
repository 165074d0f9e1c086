"""The short form of `scripts/torture`: nothing is lost by kills, power cuts, full disks or damaged files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]


def test_the_short_torture_loses_nothing(
    program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """A part of each family of trials, and every negative control: a part of the state left out must be noticed."""
    run = program(
        [sys.executable, "-m", "stress.torture_trials", "--short", "--record", str(tmp_path / "trials.jsonl")],
        timeout=1800,
        PYTHONPATH=":".join(map(str, (ROOT, ROOT / "tests"))),
        OMP_NUM_THREADS="1",
    )
    outcomes = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert len(outcomes) > 90
    assert all(outcome["lost"] is None for outcome in outcomes)
