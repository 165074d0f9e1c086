"""The arithmetic of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model

from lora_trainer.cli.plan import explanation, prepare_plan
from lora_trainer.config.load import load_config
from lora_trainer.config.schema import LoraConfig, RunConfig
from lora_trainer.errors import ConfigError
from lora_trainer.models.adapters.bank import peft_config
from lora_trainer.planning.run_plan import RunPlan, lora_parameters, plan_run, steps_per_epoch


def config(**sections: object) -> RunConfig:
    base = {"name": "x", "model": {"path": "b"}, "data": {"dir": "d"}, "train": {"max_steps": 10}}
    return RunConfig.model_validate(base | sections)


def planned(run: RunConfig, samples: int = 100, processes: int = 1) -> RunPlan:
    return plan_run(
        run,
        denoiser="unet",
        num_images=samples,
        bucket_sizes=[samples],
        num_processes=processes,
        target_shapes={"a.to_q": (8, 4)},
    )


@pytest.mark.parametrize(
    ("samples", "processes", "batch", "accumulation", "updates"),
    [(1000, 1, 100, 1, 10), (1000, 1, 4, 2, 125), (1001, 1, 4, 2, 126), (120, 4, 2, 1, 15), (1050, 1, 100, 1, 11)],
)
def test_updates_per_epoch(samples: int, processes: int, batch: int, accumulation: int, updates: int) -> None:
    train = {"epochs": 3, "batch_size": batch, "gradient_accumulation_steps": accumulation}
    plan = planned(config(train=train), samples, processes)
    assert plan.steps_per_epoch == updates
    assert plan.num_steps == 3 * updates


def test_buckets_round_up_one_by_one() -> None:
    assert steps_per_epoch([5, 3, 9], 4) == 2 + 1 + 3


def test_the_split_of_the_global_batch_does_not_matter() -> None:
    splits = [(1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 1, 2)]
    plans = [
        planned(config(train={"epochs": 2, "batch_size": b, "gradient_accumulation_steps": a}), 101, p)
        for p, b, a in splits
    ]
    assert len({(plan.steps_per_epoch, plan.num_steps, plan.param_groups[0].lr_end) for plan in plans}) == 1


def test_learning_rates_and_periods() -> None:
    run = config(
        train={"epochs": 4, "batch_size": 10},
        lr_scheduler={"type": "linear", "warmup_steps": "1ep"},
        optimizer={"lr": 1e-3},
        sample={"prompts": ["x"], "every_steps": "25%"},
        export={"every_steps": "1ep"},
        checkpoint={"every_steps": None},
    )
    plan = planned(run)
    (group,) = plan.param_groups
    assert (group.name, group.num_warmup_steps, group.lr_start, group.lr_peak) == ("unet", 10, 0.0, 1e-3)
    assert group.lr_end == pytest.approx(1e-3 / 30)
    assert (plan.periods.sample, plan.periods.export, plan.periods.checkpoint) == (10, 10, None)


def test_a_schedule_that_does_not_fit_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="does not fit into a run of 10:"):
        planned(config(lr_scheduler={"type": "linear", "warmup_steps": 10}))
    with pytest.raises(ConfigError, match="not below the base"):
        planned(config(lr_scheduler={"type": "polynomial", "lr_end": 1.0}))


def test_a_plan_survives_json() -> None:
    plan = planned(config())
    assert RunPlan.from_json(json.loads(json.dumps(plan.as_json()))) == plan


@pytest.mark.parametrize("use_dora", [False, True])
def test_parameter_counts_equal_pefts(use_dora: bool) -> None:
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(6, 10), "conv": torch.nn.Conv2d(4, 8, 3)})
    shapes = {name: tuple(layer.weight.shape) for name, layer in model.items()}
    lora = LoraConfig(rank=3, use_dora=use_dora)
    inject_adapter_in_model(peft_config(lora, list(shapes)), model)
    expected = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    plan = plan_run(
        config(adapter={"rank": 3, "use_dora": use_dora}),
        denoiser="unet",
        num_images=1,
        bucket_sizes=[1],
        num_processes=1,
        target_shapes=shapes,
    )
    assert plan.num_parameters == expected
    assert lora_parameters((10, 6), 3) == 48


def test_a_plan_is_explained_as_frequency_duration_and_intensity(toy_config: Path) -> None:
    overrides = ["train.max_steps=null", "train.epochs=4", "train.gradient_accumulation_steps=2"]
    told = list(explanation(prepare_plan(load_config(toy_config, overrides), num_processes=1)))
    words = {name: text for name, text in told if name}
    assert words["samples"].startswith("6 = the sum of images x repeats over 6 images")
    assert words["frequency"].startswith("one update per 4 samples = 1 processes x 2 images x 2 accumulated")
    assert words["duration"] == "8 updates (4 epochs x that) = 4.00 epochs"
    assert "over 1.00e-03" in words["intensity unet"]
    assert ("", "weight decay 0.01 alone shrinks a weight by 0.00% over the run") in told
    assert ("", "an epoch is 2 updates = 6 / 4, rounded up") in told
    four = dict(explanation(prepare_plan(load_config(toy_config, overrides), num_processes=4)))
    assert four["frequency"].startswith("one update per 16 samples = 4 processes")
    assert four["duration"].startswith("4 updates")


def test_the_shrink_by_weight_decay_is_that_of_the_runs_own_rates(toy_config: Path) -> None:
    overrides = ["train.max_steps=2000", "lr_scheduler={type: constant}", "optimizer={lr: 1e-4, weight_decay: 0.53}"]
    prepared = prepare_plan(load_config(toy_config, overrides))
    assert ("", "weight decay 0.53 alone shrinks a weight by 10.06% over the run") in list(explanation(prepared))
    coupled = prepare_plan(load_config(toy_config, [*overrides, "optimizer={type: adam, weight_decay: 0.53}"]))
    assert not [text for _, text in explanation(coupled) if "weight decay" in text]
