"""Verdicts on real runs of the loop: settings that make no difference, and settings that do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_trainer.evidence.statistics.verdict import Rules
from lora_trainer.report.page import build_page
from lora_trainer.report.runs import read_run, read_runs

SEEDS = (1, 2, 3)


@pytest.fixture
def train_arm(train_toy: Callable[..., Path]) -> Callable[..., list[Path]]:
    """Train one setting with each seed."""

    def run(name: str, *overrides: str) -> list[Path]:
        shared = ("validation={fraction: 0.3, every_steps: 4, max_cost: 1.0}", "train.max_steps=4")
        return [train_toy(*shared, *overrides, f"seed={seed}", name=f"{name}-{seed}") for seed in SEEDS]

    return run


def test_what_makes_no_difference_wins_nothing_and_what_does_is_found(train_arm: Callable[..., list[Path]]) -> None:
    plain = train_arm("plain", "optimizer.eps=1e-8")
    same = train_arm("same", "optimizer.eps=1.01e-8")  # a difference that rounding shows and nobody needs
    page = build_page(read_runs([*plain, *same]), Rules())
    assert "no difference shown between eps 1e-08 and eps 1.01e-08" in page.headline
    assert page.notes == ()  # each seed's runs saw the same batches
    assert read_run(plain[0]).probe()[0]["relative"] == pytest.approx(1, abs=1e-12)

    slow = train_arm("slow", "optimizer.eps=1e-8", "optimizer.lr=1e-4")
    told = build_page(read_runs([*plain, *slow]), Rules()).headline
    assert (
        "(held-out loss, one setting at several LRs, one pair): cosine, LR 0.001 is better than cosine, LR 0.0001"
        in told
    )
