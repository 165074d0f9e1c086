"""A wrong key or value gives one short problem with the right name, and every fix that it prints is a fix."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lora_trainer.cli.program import app
from lora_trainer.config.load import load_config
from lora_trainer.config.names import LACKED, PEER_NAMES, type_called
from lora_trainer.config.optimizers import OPTIMIZERS
from lora_trainer.config.structure import all_keys
from lora_trainer.errors import ConfigError, Problem, remedy_of_absence
from lora_trainer.schedules import registry
from lora_trainer.schedules.registry import SCHEDULES
from lora_trainer.tracking.console import MainConsole

GOOD = "name: run\nmodel: {path: base}\ndata: {dir: images}\ntrain: {max_steps: 100}\n"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    return file


def problem(file: Path, *overrides: str) -> Problem:
    """The only problem, which is short."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    assert len(caught.value.problems) == 1, str(caught.value)
    assert len(str(caught.value)) < 500
    return caught.value.problems[0]


SCHEDULERS = {
    "StepLR": "step", "step_decay": "step", "MultiStepLR": "multistep", "ExponentialLR": "exponential",
    "exponential_decay": "exponential", "CosineAnnealingLR": "cosine_annealing", "OneCycleLR": "one_cycle",
    "CosineAnnealingWarmRestarts": "cosine_warm_restarts", "CyclicLR": "cyclic", "PolynomialLR": "polynomial",
    "ReduceLROnPlateau": "plateau", "torch.optim.lr_scheduler.StepLR": "step", "Cosine": "cosine",
    "get_constant_schedule": "constant", "get_constant_schedule_with_warmup": "constant_with_warmup",
    "get_linear_schedule_with_warmup": "linear", "get_cosine_schedule_with_warmup": "cosine",
    "get_cosine_with_hard_restarts_schedule_with_warmup": "cosine_with_restarts",
    "cosine_restarts": "cosine_with_restarts",
    "get_polynomial_decay_schedule_with_warmup": "polynomial", "get_inverse_sqrt_schedule": "inverse_sqrt",
    "get_wsd_schedule": "warmup_stable_decay", "REX": "rex", "piecewise-constant": "piecewise_constant",
    "cosine_with_min_lr": "cosine", "cosin": "cosine", "LinearLR": "torch",
}  # fmt: skip
OPTIMIZER_NAMES = {
    "AdamW": "adamw", "Adam": "adam", "SGD": "sgd", "RMSprop": "rmsprop", "Adagrad": "adagrad",
    "AdaFactor": "adafactor",
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "torch.optim.AdamW": "adamw", "AdamW8bit": "adamw_8bit",
    "PagedAdamW8bit": "adamw_8bit", "Lion": "lion", "Prodigy": "prodigy", "AdamWScheduleFree": "schedule_free_adamw",
    "came": None, "dadaptation": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("section", "written", "ours"),
    [("lr_scheduler", *names) for names in SCHEDULERS.items()]
    + [("optimizer", *names) for names in OPTIMIZER_NAMES.items()],
)
def test_types_of_other_libraries(good: Path, section: str, written: str, ours: str | None) -> None:
    found = problem(good, f"{section}={{type: {written}}}")
    assert found.what == f"`{section}.type: {written}` is not known"
    assert problem(good, f"{section}={written}").what == found.what
    known = SCHEDULES if section == "lr_scheduler" else OPTIMIZERS
    assert type_called(written, known) == ours
    if ours is None:
        assert "did you mean" not in str(found)
    else:
        assert (f"`{ours}`" in str(found.fix)) or found.fix == f"write type: torch and target: {written}"


def test_a_type_may_stand_for_its_section(good: Path) -> None:
    config = load_config(good, ["lr_scheduler=cosine", "lr_scheduler.warmup_steps=3", "optimizer=lion"])
    assert (config.lr_scheduler.type, config.lr_scheduler.warmup_steps) == ("cosine", 3)
    assert config.optimizer.type == "lion"
    assert problem(good, "lr_scheduler=step").what == "`lr_scheduler.step_size` is required"
    good.write_text(GOOD + "lr_scheduler: linear\n")
    assert load_config(good, ["lr_scheduler.warmup_steps=5%"]).lr_scheduler.type == "linear"


@pytest.mark.parametrize(
    ("wrong", "said", "mended"),
    [
        (
            "lr_scheduler={type: exponential, decay_rate: 0.9}",
            "`lr_scheduler.gamma`",
            "{type: exponential, gamma: 0.9}",
        ),
        ("lr_scheduler={type: cosine, T_max: 9}", "type cosine_annealing", "{type: cosine_annealing, t_max: 9}"),
        ("lr_scheduler={type: cosine, gamma: 0.9}", "step", "{type: step, step_size: 5, gamma: 0.9}"),
        ("lr_scheduler={type: cosine, num_warmup_steps: 9}", "warmup_steps`", "{type: cosine, warmup_steps: 9}"),
        ("lr_scheduler={type: cosine, num_training_steps: 9}", "`train.max_steps`", "{type: cosine}"),
        ("lr_scheduler=LinearLR", "target: LinearLR", "{type: torch, target: LinearLR}"),
        ("optimizer={type: adamw, momentum: 0.9}", "sgd, rmsprop", "{type: rmsprop, momentum: 0.9}"),
        ("data.captions.extension=txt", "as .txt", ".txt"),
        ("name=a/b", "letters, digits", "a-b"),
    ],
)
def test_options_of_other_libraries(good: Path, wrong: str, said: str, mended: str) -> None:
    assert said in str(problem(good, wrong))
    load_config(good, [f"{wrong.partition('=')[0]}={mended}"])


@pytest.mark.parametrize("peer", sorted(LACKED))
def test_a_setting_that_we_lack_is_called_that(good: Path, peer: str) -> None:
    for key in (peer, f"train.{peer}"):
        found = problem(good, f"{key}=1")
        assert found.what == f"`{key}` is not a setting: other trainers have it, this one does not"
        for named in re.findall(r"`([\w.]+)`", str(found.fix)):
            assert named in all_keys()
    assert peer not in PEER_NAMES
    assert peer not in {key.rpartition(".")[2] for key in all_keys()}


@pytest.mark.parametrize("command", ["train", "sweep", "check", "plan", "find-lr", "schedules plot"])
def test_a_second_config_is_refused(good: Path, command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "-c", str(good), "-c", str(good)])
    assert done.exit_code == 2
    assert "one configuration file" in done.output


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("C:\\Users\\me\\cats", "data.dir=/mnt/c/Users/me/cats"),
        ("D:/cats", "data.dir=/mnt/d/cats"),
        ("https://example.org/cats", "download it"),
        ("cats", "relative paths start where you are"),
    ],
)
def test_a_path_from_elsewhere_is_known(path: str, said: str) -> None:
    assert said in remedy_of_absence(path, "data.dir")


def test_a_group_has_what_a_schedule_has(good: Path) -> None:
    """`lr_scheduler: cosine` in a group, and names of other libraries there."""
    group = "optimizer={type: adamw, lr: 1e-3, groups: [{name: own, match: [attn1], lr_scheduler: %s}]}"
    config = load_config(good, [group % "cosine"])
    assert config.optimizer.groups[0].lr_scheduler is not None
    assert config.optimizer.groups[0].lr_scheduler.type == "cosine"
    assert "`lr_scheduler.gamma`" in str(problem(good, group % "{type: exponential, decay_rate: 0.9}"))
    assert "`step`" in str(problem(good, group % "{type: StepLR, step_size: 3}").fix)
    assert "`lr_scheduler.gamma`" in str(
        problem(good, "lr_scheduler={type: phases, phases: [{type: exponential, decay_rate: 0.9, steps: 9}]}")
    )


@pytest.mark.parametrize("name", ["num_iter", "num-iter", "train.num_iters"])
def test_iterations_are_updates(good: Path, name: str) -> None:
    assert problem(good, f"{name}=9").fix == "here it is called `train.max_steps`"


def test_a_schedule_where_one_stands_is_found_once_allowed(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (good.parent / "own_curve.py").write_text("def saw(num_updates, updates_per_epoch):\n    return lambda k: 0.5\n")
    monkeypatch.chdir(good.parent)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    words = ["schedules", "explain", "own_curve:saw"]
    assert CliRunner().invoke(app, words).exit_code != 0
    assert CliRunner().invoke(app, [*words, "--allow-plugins"]).exit_code == 0
    registry.allow_plugins(False)


def test_rows_of_a_plan_fit_a_terminal_and_stay_whole_elsewhere() -> None:
    rows = [("a" * 50, "word " * 40), ("short", "/a/path/" + "x" * 90), ("", "note")]
    shown: dict[bool, list[str]] = {}
    for is_terminal in (True, False):
        screen, console = io.StringIO(), MainConsole()
        console.rich = Console(file=screen, width=80, force_terminal=is_terminal, soft_wrap=True, highlight=False)
        console.table("Title", rows)
        shown[is_terminal] = screen.getvalue().splitlines()
    assert all(len(line) <= 80 or "x" * 90 in line for line in shown[True])
    assert " ".join(shown[True]).count("word") == 40
    assert len(shown[False]) == 2 + len(rows)
