"""Optimizers against torch's own and their packages' steps, and the pairs with schedules that are refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lion_pytorch
import prodigyopt
import pytest
import schedulefree
import torch
from pydantic import TypeAdapter
from transformers.optimization import Adafactor

from lora_trainer.config.learning_rates import PRESETS
from lora_trainer.config.load import check_source
from lora_trainer.config.optimizers import ROWS, AnyOptimizerOptions, OptimizerOptions, OptimizerRow
from lora_trainer.config.source import Source
from lora_trainer.errors import ConfigError, ExitCode, SystemSetupError
from lora_trainer.schedules.schedule import Horizon
from lora_trainer.tracking.metrics import step_rows
from lora_trainer.training.optimizers import build_optimizer, evaluated_weights, step_size

pytestmark = pytest.mark.quick

HORIZON = Horizon(20, 5)


def options(**written: Any) -> OptimizerOptions:
    return TypeAdapter(AnyOptimizerOptions).validate_python(written)


def trained(build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> torch.Tensor:
    """A least-squares problem after ten steps."""
    stream = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 3, generator=stream))
    inputs, outputs = torch.randn(32, 6, generator=stream), torch.randn(32, 3, generator=stream)
    optimizer = build([weight])
    for _ in range(10):
        optimizer.zero_grad()
        (inputs @ weight - outputs).square().mean().backward()
        optimizer.step()
    return weight.detach()


PAIRS: list[tuple[dict[str, Any], Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]] = [
    ({"type": "adamw", "lr": 0.01}, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01)),
    ({"type": "adam", "lr": 0.01, "weight_decay": 0.1}, lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
    ({"type": "sgd", "lr": 0.1, "nesterov": True}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    ({"type": "rmsprop", "lr": 0.01}, lambda p: torch.optim.RMSprop(p, lr=0.01)),
    ({"type": "adagrad", "lr": 0.01}, lambda p: torch.optim.Adagrad(p, lr=0.01)),
    (
        {"type": "adafactor", "lr": 1e-3, "beta1": 0.9},
        lambda p: Adafactor(p, lr=1e-3, beta1=0.9, scale_parameter=False, relative_step=False),
    ),
    ({"type": "lion", "lr": 1e-3}, lambda p: lion_pytorch.Lion(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)),
    (
        {"type": "prodigy"},
        lambda p: prodigyopt.Prodigy(p, weight_decay=0.01, use_bias_correction=True, safeguard_warmup=True),
    ),
]


@pytest.mark.parametrize(("written", "theirs"), PAIRS)
def test_equals_the_librarys_own(written: dict[str, Any], theirs: Any) -> None:
    ours = trained(lambda parameters: build_optimizer(options(**written), [parameters], HORIZON))
    assert torch.equal(ours, trained(theirs))


def test_adafactors_relative_step_is_a_constant_lr_written_out() -> None:
    preset = PRESETS["adafactor"].settings
    assert preset["lr_scheduler"] == {"type": "constant"}
    ours = trained(lambda parameters: build_optimizer(options(**preset["optimizer"]), [parameters], HORIZON))
    assert torch.equal(ours, trained(lambda p: Adafactor(p, relative_step=True)))


def test_schedule_free_equals_its_package_and_warms_up_in_updates() -> None:
    def theirs(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = schedulefree.AdamWScheduleFree(parameters, lr=0.01, weight_decay=0.01, warmup_steps=4)
        optimizer.train()
        return optimizer

    written = {"type": "schedule_free_adamw", "lr": 0.01, "warmup_steps": "20%"}
    ours = trained(lambda parameters: build_optimizer(options(**written), [parameters], HORIZON))
    assert torch.equal(ours, trained(theirs))


def test_evaluated_weights_leave_the_training_weights_bit_by_bit() -> None:
    weight = torch.nn.Parameter(torch.randn(50))
    optimizer = build_optimizer(options(type="schedule_free_adamw", lr=0.01), [[weight]], HORIZON)
    for _ in range(5):
        weight.grad = torch.randn(50)
        optimizer.step()
    before = weight.detach().clone()
    evaluated = evaluated_weights(optimizer)
    assert evaluated is not None
    assert torch.equal(weight, before)
    assert not torch.equal(evaluated[0], before)
    weight.grad = torch.randn(50)
    optimizer.step()  # refuses outside its training mode
    assert evaluated_weights(torch.optim.AdamW([weight])) is None


def test_sgd_moves_by_lr_times_gradient() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer(options(type="sgd", lr=0.001, momentum=0), [[weight]], HORIZON)
    weight.grad = torch.tensor([2.5])
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.0025)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("lion", "lion_pytorch", "optimizers"),
        ("prodigy", "prodigyopt", "optimizers"),
        ("adamw_8bit", "bitsandbytes", "8bit"),
    ],
)
def test_an_absent_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    honest = importlib.import_module

    def absent(module: str) -> Any:
        if module.partition(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return honest(module)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(SystemSetupError, match=rf"pip install 'lora_trainer\[{extra}\]'") as caught:
        build_optimizer(options(type=name), [[torch.nn.Parameter(torch.zeros(1))]], HORIZON)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_builds(row: OptimizerRow) -> None:
    if row.extra == "8bit":
        pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
    required = {"lr": 0.1} if row.options.model_fields["lr"].is_required() else {}
    chosen = options(type=row.name, **required)
    assert type(chosen) is row.options
    built = build_optimizer(chosen, [[torch.nn.Parameter(torch.ones(2, 2))]], HORIZON)
    assert built.param_groups[0]["lr"] == chosen.lr
    assert built.param_groups[0]["weight_decay"] == chosen.weight_decay


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"type": "schedule_free_adamw"}, "lr_scheduler": {"type": "cosine"}}, "type: constant"),
        (
            {
                "optimizer": {"type": "schedule_free_adamw"},
                "lr_scheduler": {"type": "constant"},
                "train": {"max_steps": 9, "ema_decay": 0.9},
            },
            "an average of its own",
        ),
        (
            {"optimizer": {"type": "prodigy", "groups": [{"name": "b", "match": ["lora_B.weight"], "lr": 0.1}]}},
            "one step size",
        ),
        (
            {
                "optimizer": {
                    "type": "prodigy",
                    "groups": [{"name": "b", "match": ["lora_B.weight"], "lr_scheduler": {"type": "linear"}}],
                }
            },
            "one step size",
        ),
        ({"optimizer": {"type": "prodigy", "lr": 1e-4}}, "optimizer.lr"),
        ({"optimizer": {"type": "adafactor", "relative_step": True}}, "optimizer.lr: 1e-2, with scale_parameter: true"),
        ({"optimizer": {"type": "adamw", "lr": 1.0}}, "less than 1"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(sections: dict[str, Any], said: str) -> None:
    base = {"name": "x", "model": {"path": "b"}, "data": {"dir": "d"}, "train": {"max_steps": 9}}
    with pytest.raises(ConfigError, match=said):
        check_source(Source(base | sections))


def test_prodigy_logs_its_step_size(train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy("optimizer={type: prodigy}", "lr_scheduler={type: constant}")
    rows = step_rows(run_dir / "metrics.jsonl")
    assert all(row["d*lr"] == row["d"] * row["lr"] for row in rows)
    assert rows[-1]["d"] >= rows[0]["d"] > 0
    assert step_size(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])) is None
