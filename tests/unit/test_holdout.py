"""Which images are held out: by content, so that nothing moves when files are added."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lora_trainer.config.schema import RunConfig, ValidationConfig
from lora_trainer.data.holdout import split_by_folder, split_by_fraction, with_watched
from lora_trainer.data.records import Dataset, Record
from lora_trainer.errors import DataError
from lora_trainer.planning.run_plan import plan_validation
from lora_trainer.schedules.schedule import Horizon


def record(number: int) -> Record:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return Record(Path(f"{number}.png"), f"{number}.png", digest, (64, 64), 1, ("x",))


def dataset(num: int, first: int = 0) -> Dataset:
    return Dataset(tuple(record(number) for number in range(first, first + num)), ())


def held_out(num: int, fraction: float, seed: int = 0) -> set[str]:
    return {r.name for r in split_by_fraction(dataset(num), fraction, seed, None).held_out}


def test_added_files_move_none() -> None:
    for num in (50, 100, 200):
        assert held_out(num, 0.1) <= held_out(num + 50, 0.1)
    assert 60 < len(held_out(1000, 0.1)) < 140
    assert held_out(100, 0.1, seed=1) != held_out(100, 0.1)


def test_held_out_images_are_not_trained_on() -> None:
    split = split_by_fraction(dataset(100), 0.2, 0, None)
    trained = {r.sha256 for r in split.training.records}
    assert not trained & {r.sha256 for r in split.held_out}
    assert len(trained) + len(split.held_out) == 100


def test_copies_go_together() -> None:
    twins = Dataset((*dataset(20).records, *dataset(20).records), ())
    split = split_by_fraction(twins, 0.3, 0, None)
    names = [r.sha256 for r in split.held_out]
    assert len(names) == len(set(names))
    assert not {r.sha256 for r in split.training.records} & set(names)


def test_at_least_two_and_never_all() -> None:
    assert len(held_out(5, 0.01)) == 2
    with pytest.raises(DataError, match="leaves none of 2"):
        split_by_fraction(dataset(2), 0.1, 0, None)


def test_an_earlier_choice_is_kept() -> None:
    chosen = [record(3).sha256, record(4).sha256]
    split = split_by_fraction(dataset(100), 0.1, 0, chosen)
    assert [r.name for r in split.held_out] == ["3.png", "4.png"]


def test_a_folder_must_be_disjoint_by_content() -> None:
    split = split_by_folder(dataset(10), dataset(5, first=10))
    assert len(split.held_out) == 5
    with pytest.raises(DataError, match=r"9\.png: a validation image is trained on too"):
        split_by_folder(dataset(10), dataset(5, first=9))
    with pytest.raises(DataError, match="2 images at least"):
        split_by_folder(dataset(10), dataset(1, first=10))


def test_as_many_trained_and_prior_images_are_watched() -> None:
    split = with_watched(split_by_fraction(dataset(100), 0.1, 0, None), dataset(30, first=500), 4, seed=0)
    assert {name: len(records) for name, records in split.probes.items()} == {"held_out": 4, "train": 4, "prior": 4}
    trained = {r.sha256 for r in split.training.records}
    assert all(r.sha256 in trained for r in split.probes["train"])


def planned(num_updates: int, batch: int, items: int, **options: object) -> tuple[int, int, int]:
    config = ValidationConfig.model_validate({"fraction": 0.1, **options})
    plan = plan_validation(config, Horizon(num_updates, 10), batch, num_held_out=items, num_probes=2)
    assert plan.cost <= config.max_cost or any("over the cap" in note for note in plan.notes)
    return plan.num_items, plan.every, plan.num_measurements


def test_the_cost_cap_takes_items_first_then_the_period() -> None:
    assert planned(10_000, 4, 20) == (20, 1000, 10)
    items, every, times = planned(3000, 4, 20)
    assert 2 <= items < 20
    assert (every, times) == (300, 10)
    items, every, times = planned(3000, 1, 20, every_steps=50)
    assert items == 2
    assert 50 < every <= 300
    assert times >= 10
    assert planned(300, 1, 20, every_steps=10)[:2] == (2, 30)


def test_a_longer_run_keeps_the_images_it_began_to_watch() -> None:
    """Readings before and after are compared image by image."""
    config = ValidationConfig(fraction=0.1)
    free, kept = (
        plan_validation(config, Horizon(10_000, 10), 4, num_held_out=20, num_probes=2, num_watched=watched)
        for watched in (None, 3)
    )
    assert (free.num_items, kept.num_items, kept.every) == (20, 3, 1000)


def test_validation_needs_one_source() -> None:
    from lora_trainer.config.conflicts import conflicts

    base = {"name": "x", "model": {"path": "b"}, "data": {"dir": "d"}, "train": {"max_steps": 1}}
    for validation in ({}, {"dir": "a", "fraction": 0.1}):
        config = RunConfig.model_validate(base | {"validation": validation})
        assert ["validation" in problem.what for _, problem in conflicts(config)] == [True]
    plateau = RunConfig.model_validate(base | {"lr_scheduler": {"type": "plateau"}})
    assert ["plateau" in problem.what for _, problem in conflicts(plateau)] == [True]
