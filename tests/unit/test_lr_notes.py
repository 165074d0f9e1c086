"""Notes on unusual learning rates: by optimizer, and silent on every default and preset."""

from __future__ import annotations

from typing import Any

import pytest

from lora_trainer.config.learning_rates import PRESETS, small_set_note, unusual_rates
from lora_trainer.config.load import check_source
from lora_trainer.config.optimizers import OPTIMIZERS
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.source import Source, set_value, split_override

BASE = {"name": "x", "model": {"path": "b"}, "data": {"dir": "d"}, "train": {"max_steps": 9}}


def config(**optimizer: Any) -> RunConfig:
    return check_source(Source(BASE | {"optimizer": optimizer, "lr_scheduler": {"type": "constant"}}))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_defaults_are_usual(kind: str) -> None:
    assert list(unusual_rates(config(type=kind, **({"lr": 0.1} if kind == "sgd" else {})))) == []


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"full"}))
def test_the_presets_are_usual(name: str) -> None:
    source = Source(dict(BASE))
    for word in PRESETS[name].overrides():
        set_value(source, *split_override(word, None), None)
    assert list(unusual_rates(check_source(source))) == []


@pytest.mark.parametrize(
    ("kind", "lr", "said"),
    [
        ("adamw", 0.02, "above the usual range of adamw"),
        ("adamw", 5e-6, "below the usual range of adamw"),
        ("lion", 2e-3, "above the usual range of lion"),
        ("sgd", 1e-4, "below the usual range of sgd"),
    ],
)
def test_the_range_is_the_optimizers(kind: str, lr: float, said: str) -> None:
    (note,) = unusual_rates(config(type=kind, lr=lr))
    assert said in note


@pytest.mark.parametrize(("kind", "lr"), [("sgd", 0.02), ("lion", 5e-6)])
def test_what_adamw_could_not_use_suits_another_optimizer(kind: str, lr: float) -> None:
    assert list(unusual_rates(config(type="adamw", lr=lr)))
    assert list(unusual_rates(config(type=kind, lr=lr))) == []


def test_a_groups_own_rate_is_looked_at() -> None:
    (note,) = unusual_rates(config(type="adamw", groups=[{"name": "up", "match": ["lora_B.weight"], "lr": 0.5}]))
    assert note.startswith("the LR of group up 0.5")


@pytest.mark.parametrize(
    ("kind", "lr", "num_images", "noted"),
    [
        ("adamw", 1e-4, 20, True),
        ("adamw", 5e-5, 20, False),
        ("adamw", 1e-4, 51, False),
        ("lion", 1e-4, 20, False),
    ],
)
def test_a_small_set_is_noted(kind: str, lr: float, num_images: int, noted: bool) -> None:
    assert (small_set_note(config(type=kind, lr=lr), num_images) is not None) == noted
