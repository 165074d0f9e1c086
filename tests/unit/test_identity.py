"""Every setting and fact has one level, and a difference is refused, said or free by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_trainer.config.identity import RESOLVED, Changes, compare, identity_fields, level_of, refusal
from lora_trainer.config.load import load_config
from lora_trainer.config.schema import FACTS, LEVELS, ResumeConfig
from lora_trainer.config.structure import all_keys
from lora_trainer.errors import ConfigError

CONFIG = """
name: toy
model: {path: base}
data: {dir: images, captions: {dropout: 0.1}}
optimizer: {type: adamw, lr: 1e-3, groups: [{name: up, match: [to_q], lr: 1e-4}]}
lr_scheduler: {type: cosine, warmup_steps: 2}
train: {max_steps: 6}
validation: {fraction: 0.3}
sample: {prompts: [x]}
sweep: {seeds: [1, 2]}
"""
LEVEL_OF_ROW = {key: level for key, level in LEVELS.items() if not key.endswith(".*")}


@pytest.fixture
def identity(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "toy.yaml"
    file.write_text(CONFIG)
    return identity_fields(load_config(file)) | dict.fromkeys([*FACTS, *RESOLVED], "known")


def rows_for(key: str) -> list[str]:
    """The rows of the table that a key of the schema stands under."""
    parts = key.split(".")
    wholes = [".".join(parts[: length + 1]) for length in range(len(parts))]  # a list of sections counts as one value
    return [row for row in LEVELS if row in wholes or (row.endswith(".*") and row[:-2] in wholes[:-1])]


def test_every_setting_has_exactly_one_level() -> None:
    keys = all_keys()
    sections = {key for key in keys if any(row.startswith(f"{key}.") for row in LEVELS)}
    assert {"data", "data.captions", "optimizer", "train", "sweep"} <= sections
    counts = {key: rows_for(key) for key in keys if key not in sections}
    assert len(counts) > 150
    assert {key: rows for key, rows in counts.items() if len(rows) != 1} == {}


def test_no_row_is_stale() -> None:
    keys = {*all_keys(), *FACTS}
    assert [row for row in LEVELS if row.removesuffix(".*") not in keys] == []
    assert set(RESOLVED) <= set(LEVELS)
    assert set(FACTS) <= set(LEVELS)


def test_every_value_of_a_config_is_looked_up_in_the_table(identity: dict[str, Any]) -> None:
    assert {key for key in identity if level_of(key) not in ("refuse", "say")} == set()
    assert "optimizer.groups" in identity
    assert "data.captions.dropout" in identity
    assert not {"name", "output_dir", "data.dir", "sweep.seeds", "sample.prompts"} & set(identity)


@pytest.mark.parametrize("key", LEVEL_OF_ROW)
def test_a_difference_is_taken_by_its_level(key: str) -> None:
    changes = compare({key: 1}, {key: 2}, ResumeConfig(), "here")
    refused, said = ((key,) if LEVEL_OF_ROW[key] == level else () for level in ("refuse", "say"))
    assert changes == Changes(refused, (), said, ())


def test_the_rows_of_a_whole_section_hold_for_each_key() -> None:
    before = {"optimizer.lr": 1, "lr_scheduler.type": "cosine", "sample.prompts": [], "sweep.seeds": [1]}
    now = {"optimizer.lr": 2, "lr_scheduler.type": "rex", "sample.prompts": ["x"], "sweep.seeds": [2]}
    changes = compare(before, now, ResumeConfig(), "here")
    assert changes == Changes(("lr_scheduler.type", "optimizer.lr"), (), (), ())


def test_what_resume_allows_is_accepted_by_key_or_section() -> None:
    before, now = {"optimizer.lr": 1, "seed": 1, "data order": "a"}, {"optimizer.lr": 2, "seed": 2, "data order": "b"}
    allowed = ResumeConfig(allow_changes=("optimizer.lr", "data order"))
    assert compare(before, now, allowed, "here") == Changes(("seed",), ("data order", "optimizer.lr"), (), ())


DEFAULTS = {
    "adapter.use_dora": False,
    "adapter.targets": "attention",
    "data.captions.dropout": 0.0,
    "lr_scheduler.warmup_steps": 0,
    "objective.min_snr_gamma": None,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.groups": [],
    "optimizer.weight_decay": 0.01,
    "seed": 42,
    "train.ema_decay": None,
    "train.gradient_accumulation_steps": 1,
    "train.max_grad_norm": 1.0,
    "validation.every_steps": "10%",
    "validation.max_cost": 0.1,
    "validation.seed": 0,
}


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_setting_that_an_older_run_lacks_counts_as_its_default(identity: dict[str, Any], key: str) -> None:
    now = identity | {key: DEFAULTS[key]}
    before = {name: value for name, value in now.items() if name != key}
    assert compare(before, now, ResumeConfig(), "here") == Changes((), (), (), ())
    assert compare(now, before, ResumeConfig(), "here") == Changes((), (), (), ())
    other = now | {key: "another"}
    changes = compare(before, other, ResumeConfig(), "here")
    assert (*changes.refused, *changes.noted) == (key,)
    problem = refusal(before, other, [key], "here")
    assert f"{key}: {DEFAULTS[key]} -> another" in str(problem)


@pytest.mark.parametrize("key", [*FACTS, *RESOLVED])
def test_what_an_older_version_could_not_know_is_taken_as_unchanged(identity: dict[str, Any], key: str) -> None:
    now = identity | {key: "known now"}
    for before in ({k: v for k, v in identity.items() if k != key}, identity | {key: "auto"}):
        assert compare(before, now, ResumeConfig(), "here") == Changes((), (), (), (key,))


def test_what_is_not_known_yet_is_not_compared(identity: dict[str, Any]) -> None:
    """A plan knows no precision yet where that is `auto`."""
    before = identity | {"train.precision": "bf16"}
    now = {key: value for key, value in identity.items() if key not in FACTS} | {"train.precision": "auto"}
    changes = compare(before, now, ResumeConfig(), "here")
    assert "train.precision" not in (*changes.refused, *changes.noted)


def test_a_section_that_appears_is_compared_with_its_defaults(identity: dict[str, Any]) -> None:
    without = {key: value for key, value in identity.items() if not key.startswith("validation.")}
    changes = compare(without | {"validation": None}, identity, ResumeConfig(), "here")
    assert changes == Changes(("validation.fraction",), (), (), ())


def test_a_setting_that_is_gone_is_said() -> None:
    changes = compare({"adapter.bygone": 5}, {}, ResumeConfig(), "here")
    assert changes == Changes((), (), ("adapter.bygone",), ())


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        ("adapter.rank", "`adapter.rank` cannot change in a run"),
        ("adapter", "`adapter` cannot change in a run"),
        ("sed", "did you mean `seed`"),
        ("name", "`name` in resume.allow_changes is no setting of a run's identity"),
    ],
)
def test_what_cannot_be_allowed_is_refused(identity: dict[str, Any], allowed: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compare(identity, identity, ResumeConfig(allow_changes=(allowed,)), "here")
    assert said in str(caught.value)
