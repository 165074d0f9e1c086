"""An installed package adds a schedule and an optimizer: checked, planned, trained and resumed like our own."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_resume import assert_same_run_twice

from lora_trainer.cli.plan import explanation, prepare_plan
from lora_trainer.cli.program import main
from lora_trainer.config import optimizers
from lora_trainer.config.identity import identity_fields
from lora_trainer.config.load import load_config
from lora_trainer.config.optimizers import OptimizerOptions, OptimizerRow
from lora_trainer.errors import ConfigError, SystemSetupError
from lora_trainer.lora_files.files import read_lora, read_recipe
from lora_trainer.planning.rows import plan_rows
from lora_trainer.testing import OptimizerContract, ScheduleContract
from lora_trainer.tracking.metrics import step_rows
from lora_trainer.training.optimizers import build_optimizer

FOLDER = Path(__file__).parents[1] / "example_plugin"
SIGN_SGD = "optimizer={type: sign_sgd, lr: 1e-3, momentum: 0.5, weight_decay: 0.1}"
SAWTOOTH = "lr_scheduler={type: sawtooth, args: {low: 0.2}}"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders that an installation puts on the path: the package, and the metadata that pip writes for it."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    site = tmp_path / "site"
    metadata = site / f"lora_example-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    for folder in (FOLDER, site):
        monkeypatch.syspath_prepend(folder)
    yield [FOLDER, site]
    for name in [name for name in sys.modules if name.partition(".")[0] == "lora_example"]:
        del sys.modules[name]


@pytest.mark.process
def test_the_plugins_own_tests_pass(installed: list[Path], program: Callable[..., Any]) -> None:
    path = ":".join(map(str, [Path(__file__).parents[2], *installed]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        str(FOLDER / "pyproject.toml"),
        str(FOLDER),
    ]
    done = program(command, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_it_trains_to_the_end(installed: list[Path], train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy(SIGN_SGD, SAWTOOTH)
    lrs = [row["lr"] for row in step_rows(run_dir / "metrics.jsonl")]
    assert lrs == pytest.approx([1e-3 * (1 - 0.8 * (k % 3) / 3) for k in range(6)])
    saved = load_config(run_dir / "config.yaml")
    assert saved.optimizer.model_dump()["momentum"] == 0.5
    assert identity_fields(saved)["optimizer.momentum"] == 0.5
    recipe = read_recipe(read_lora(run_dir / "toy.safetensors")[1])
    assert recipe is not None
    assert recipe.optimizer == saved.optimizer
    assert json.loads(recipe.to_metadata())["optimizer"]["momentum"] == 0.5
    with pytest.raises(ConfigError, match=r"optimizer\.momentum: 0\.5 -> 0\.9"):
        train_toy(SIGN_SGD.replace("0.5", "0.9"), SAWTOOTH)


def test_it_resumes_bit_by_bit(
    installed: list[Path], train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_run_twice(train_toy, monkeypatch, (SIGN_SGD, SAWTOOTH), [3])


def test_check_and_plan_know_it(installed: list[Path], toy_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", "-c", str(toy_config), "--config-only", SIGN_SGD, SAWTOOTH])
    assert not ended.value.code
    prepared = prepare_plan(load_config(toy_config, [SIGN_SGD.replace("1e-3", "1e-2"), SAWTOOTH]))
    rows = list(plan_rows(prepared))
    assert ("optimizer", "sign_sgd, weight decay 0.1") in rows
    assert any("above the usual range of sign_sgd (1e-06 to 0.001)" in said for _, said in rows)
    assert any("weight decay 0.1 alone shrinks a weight" in said for _, said in explanation(prepared))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer={type: sign_sgd, momentm: 0.5}", "did you mean `momentum`"),
        ("optimizer={type: sign_sgd, momentum: 2}", "`optimizer.momentum`: expected less than or equal to 1"),
        ("optimizer={type: sign_sgd, momentum: true}", "a number is expected here"),
        ("optimizer={type: sign_sgd, betas: [0.9, 0.99]}", "`optimizer.betas` has no effect on this `optimizer.type`"),
        ("optimizer={type: sign_sdg}", "did you mean `sign_sgd`"),
        ("optimizer={type: adamw, momentum: 0.5}", "choose a type that has it: sgd, rmsprop, sign_sgd"),
        ("lr_scheduler={type: sawtoth, args: {}, warmup_steps: 5}", "did you mean `sawtooth`"),
        ("lr_scheduler={type: sawtooth, low: 0.2}", "`lr_scheduler.low` is not a setting"),
    ],
)
def test_it_is_checked_as_strictly_as_ours(installed: list[Path], toy_config: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(toy_config, [override])
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


def test_without_the_package_its_optimizer_is_not_known(toy_config: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.type: sign_sgd` is not known"):
        load_config(toy_config, [SIGN_SGD])


class Careless(torch.optim.Optimizer):
    """Keeps its momentum where no checkpoint finds it, and moves at a learning rate of 0."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.means: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                mean = self.means.setdefault(index, torch.zeros(())) * 0.9 + parameter.grad.mean()
                self.means[index] = mean
                parameter.sub_(mean * max(group["lr"], 1e-5))


class CarelessOptions(OptimizerOptions):
    type: str = "careless"


def offer(monkeypatch: pytest.MonkeyPatch, name: str, loads: Callable[[], Any]) -> None:
    """Let an installed package have an entry point for an optimizer."""
    entry = SimpleNamespace(name=name, value=f"package:{name}", load=loads)
    monkeypatch.setattr(optimizers, "entry_points", lambda group, **_: [entry])


def test_the_contract_finds_a_careless_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    row = OptimizerRow(CarelessOptions, f"{__name__}:Careless", (1e-5, 1e-3), decoupled_decay=True, element_wise=True)
    offer(monkeypatch, "careless", lambda: row)

    class Contract(OptimizerContract):
        name = "careless"

    kept = Contract()
    kept.test_it_builds_over_groups_of_parameters()
    kept.test_a_step_moves_every_parameter()
    for broken in (
        kept.test_a_learning_rate_of_zero_moves_nothing,
        kept.test_a_resume_goes_on_bit_by_bit,
        kept.test_nothing_is_kept_outside_of_state_and_param_groups,
        kept.test_a_decoupled_decay_shrinks_by_lr_x_decay,
        kept.test_element_wise_weights_may_lie_in_one_flat_buffer,
    ):
        with pytest.raises(AssertionError):
            broken()


CALLS: list[int] = []


def counting(num_updates: int, updates_per_epoch: int) -> Callable[[int], float]:
    """A schedule that remembers how often it was laid."""
    CALLS.append(num_updates)
    return lambda k: 1 / len(CALLS)


def test_the_contract_finds_a_schedule_that_remembers() -> None:
    class Contract(ScheduleContract):
        name = f"{__name__}:counting"

    Contract().test_every_value_can_be_a_learning_rate()
    with pytest.raises(AssertionError, match="another curve"):
        Contract().test_it_depends_on_the_update_and_the_length_alone()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (lambda: Careless, "is no OptimizerRow whose options have the type `careless`"),
        (lambda: OptimizerRow(optimizers.AdamW, "torch.optim:AdamW", (1e-5, 1e-3)), "have the type `careless`"),
        (lambda: (_ for _ in ()).throw(ImportError("no module named x")), "cannot be imported: no module named x"),
    ],
)
def test_a_package_that_gives_no_row_is_told_of(
    monkeypatch: pytest.MonkeyPatch, toy_config: Path, row: Callable[[], Any], said: str
) -> None:
    offer(monkeypatch, "careless", row)
    with pytest.raises(ConfigError, match=said):
        load_config(toy_config, ["optimizer={type: careless}"])
    with pytest.raises(ConfigError, match="did you mean `betas`"):
        load_config(toy_config, ["optimizer={type: adamw, beta: 1}"])


def test_a_builder_that_is_not_there_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "careless", lambda: OptimizerRow(CarelessOptions, f"{__name__}:Absent", (1e-5, 1e-3)))
    with pytest.raises(SystemSetupError, match="Absent"):
        build_optimizer(CarelessOptions(), [], optimizers.Horizon(1, 1))
