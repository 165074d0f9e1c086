"""At a large learning rate a decaying schedule ends below a constant one, on the shipped base and images (R27)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from lora_trainer.cli.train import sweep

pytestmark = pytest.mark.usefixtures("plain_pictures")


def test_a_decay_ends_below_a_constant_lr_on_every_seed(tmp_path: Path) -> None:
    """The short form of `scripts/demo_sweep --full` (benchmarks/results/demo_sweep_full.json)."""
    grid = "{lr_scheduler: [{type: constant}, {type: linear}], optimizer.lr: [1.2e-2]}"
    words = [
        f"output_dir={tmp_path}",
        "sample={}",
        "train.max_steps=24",
        "train.batch_size=2",
        "train.threads=1",
        'validation={fraction: 0.1, every_steps: "100%", max_cost: 1.0}',
        f"sweep={{grid: {grid}, seeds: [1, 2, 3]}}",
    ]
    sweep(ROOT / "configs" / "demo_sweep.yaml", words)
    trials = json.loads((tmp_path / "demo-sweep" / "sweep.json").read_text())["trials"]
    ends = {(trial["setting"], trial["seed"]): trial["final"]["relative"] for trial in trials}
    assert len(ends) == 6
    assert [ends["linear", seed] < ends["constant", seed] for seed in (1, 2, 3)] == [True] * 3
