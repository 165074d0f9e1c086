"""Runs that revision 4d24846 left, with checkpoints of format 1, go on and end as that revision would have ended them.

They were made on another processor perhaps, so numbers are compared to a thousandth of each tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import stop_after
from safetensors.torch import load_file

from lora_trainer.cli import train as train_command
from lora_trainer.errors import ConfigError, StoppedBySignal
from lora_trainer.lora_files.files import read_lora, read_recipe
from lora_trainer.planning.run_plan import RunPlan
from lora_trainer.storage.checkpoint import open_checkpoint
from lora_trainer.tracking.metrics import read_rows, step_rows
from lora_trainer.training.resume import stored_trial

pytestmark = pytest.mark.usefixtures("plain_pictures")

STORED = Path(__file__).parent.parent / "format_1"
TOLERANCE = 1e-3
Text = pytest.CaptureFixture[str]
Start = Callable[..., Path]
SAID = "not recorded by the earlier version, taken as unchanged: "
UNKNOWN = "accelerate, data order, device, diffusers, peft, torch, train.precision"


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start one of the stored configurations with today's program; its run directory."""

    def run(name: str, *overrides: str, output: str = "runs") -> Path:
        settings = json.loads((STORED / "settings.json").read_text())
        config: dict[str, Any] = {"name": name, **settings["all"], **settings[name]}
        config |= {"output_dir": str(tmp_path / output), "model": {"path": str(STORED / "base")}}
        config["data"] = {"dir": str(STORED / "images"), **config["data"]}
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(config))
        train_command.train(file, list(overrides))
        return tmp_path / output / name

    return run


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a stored run directory to where the program looks for it."""

    def copy(name: str, kept_as: str | None = None) -> Path:
        return Path(shutil.copytree(STORED / "stopped" / (kept_as or name), tmp_path / "runs" / name))

    return copy


def assert_close(ours: Path, theirs: Path) -> None:
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        difference = torch.linalg.vector_norm(tensor - other[name])
        assert difference <= TOLERANCE * torch.linalg.vector_norm(other[name]), name


def seen(run_dir: Path) -> list[tuple[Any, ...]]:
    """What each update saw, whatever the processor."""
    keys = ("step", "trial", "epoch", "lr", "draws")
    return [tuple(row[key] for key in keys) for row in step_rows(run_dir / "metrics.jsonl")]


def probes(run_dir: Path) -> list[tuple[int, str]]:
    rows = read_rows(run_dir / "metrics.jsonl")
    return [(row["step"], row["probe"]) for row in rows if row.get("event") == "validation"]


def test_a_run_ends_as_the_earlier_version_would_have_ended_it(
    start: Start, stored: Callable[..., Path], capsys: Text
) -> None:
    """With an average, held-out images and a plan of its own."""
    before = step_rows(stored("watched") / "metrics.jsonl")
    run_dir = start("watched")
    said = capsys.readouterr().out
    assert "resuming after step 3 of 6" in said
    assert said.count(f"{SAID}{UNKNOWN}\n") == said.count(SAID) == 1
    assert "changed since" not in said
    assert "not made up for" not in said
    straight = start("watched", output="straight")
    assert_close(run_dir / "watched.safetensors", STORED / "expected" / "watched" / "watched.safetensors")
    assert_close(run_dir / "watched.safetensors", straight / "watched.safetensors")
    assert seen(run_dir) == seen(straight)
    assert probes(run_dir) == probes(straight)
    assert step_rows(run_dir / "metrics.jsonl")[:3] == before
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0


def test_it_goes_on_from_today_s_checkpoints_afterwards(
    start: Start, stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    stored("watched")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(StoppedBySignal):
            start("watched")
    assert SAID in capsys.readouterr().out
    run_dir = start("watched")
    assert SAID not in capsys.readouterr().out
    assert_close(run_dir / "watched.safetensors", STORED / "expected" / "watched" / "watched.safetensors")


@pytest.mark.parametrize(("name", "change"), [("watched", "train.batch_size=3"), ("swept", "train.batch_size=3")])
def test_another_batch_is_refused_though_only_its_parts_were_stored(
    start: Start, stored: Callable[..., Path], name: str, change: str
) -> None:
    stored(name)
    with pytest.raises(ConfigError, match="global batch: 2 -> 3"):
        start(name, change)


def test_another_precision_than_auto_meant_is_refused(start: Start, stored: Callable[..., Path]) -> None:
    stored("watched")
    with pytest.raises(ConfigError, match=r"train\.precision: fp32 -> bf16"):
        start("watched", "train.precision=bf16")
    start("watched", "train.precision=fp32")


def test_a_run_whose_two_counters_differ_goes_on_at_its_step_and_says_so_once(
    start: Start, stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    """The earlier version had skipped an update, so that all images and noise came one update later."""
    last = step_rows(stored("skipped") / "metrics.jsonl")[-1]
    assert (last["step"], last["attempt"]) == (3, 4)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(StoppedBySignal):
            start("skipped")
    told = (
        "1 update(s) that an earlier version skipped are not made up for: update 3 has its own images and noise again"
    )
    assert capsys.readouterr().out.count(told) == 1
    run_dir = start("skipped")
    assert "not made up for" not in capsys.readouterr().out
    straight = start("skipped", output="straight")
    assert seen(run_dir)[3:] == seen(straight)[3:]
    assert [row[0] for row in seen(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert not any("attempt" in row for row in step_rows(run_dir / "metrics.jsonl")[3:])
    assert_close(run_dir / "skipped.safetensors", STORED / "expected" / "skipped" / "skipped.safetensors")
    assert open_checkpoint(run_dir / "checkpoints", None).state["trials"]["skipped"]["skips"]["total"] == 1


def test_the_trials_of_a_sweep_go_on_those_that_share_their_updates_too(
    start: Start, stored: Callable[..., Path], capsys: Text
) -> None:
    stored("swept")
    swept = start("swept")
    said = capsys.readouterr().out
    assert said.count(f"{SAID}{UNKNOWN}\n") == said.count(SAID) == 1
    assert "trials per forward: 2, 1" in said
    straight = start("swept", output="straight")
    names = ("long-seed42", "short-seed42", "wide-seed42")
    for name in names:
        file = Path("trials") / name / f"{name}.safetensors"
        assert_close(swept / file, STORED / "expected" / "swept" / file.name)
        assert_close(swept / file, straight / file)
        assert seen((swept / file).parent) == seen((straight / file).parent)
    trials = {trial["name"]: trial for trial in json.loads((swept / "sweep.json").read_text())["trials"]}
    assert [trials[name]["status"] for name in names] == ["finished"] * 3
    assert trials["long-seed42"]["shares_until"] == {"trunk": "short-seed42", "step": 5}


def test_a_finished_run_is_finished(start: Start, stored: Callable[..., Path], capsys: Text) -> None:
    run_dir = stored("watched", kept_as="finished")
    kept = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    start("watched")
    assert "this run is finished; nothing to do" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in kept} == kept


def test_another_setting_is_refused_and_a_changed_name_is_free(start: Start, stored: Callable[..., Path]) -> None:
    run_dir = stored("watched")
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.001 -> 0\.002"):
        start("watched", "optimizer.lr=2e-3")
    with pytest.raises(ConfigError, match=r"adapter\.use_rslora: False -> True"):
        start("watched", "adapter.use_rslora=true")
    renamed = run_dir.rename(run_dir.with_name("renamed"))
    start("watched", "name=renamed")
    assert_close(renamed / "renamed.safetensors", STORED / "expected" / "watched" / "watched.safetensors")


def test_what_reads_a_checkpoint_reads_its_tensors_by_today_s_names(stored: Callable[..., Path]) -> None:
    step, tensors = stored_trial(open_checkpoint(stored("watched") / "checkpoints", None))
    assert step == 3
    assert sorted(tensors) == ["adapter", "average", "optimizer"]
    assert all(name.startswith("unet.") for own in tensors.values() for name in own)
    assert tensors["adapter"].keys() == tensors["average"].keys()


def test_files_keep_the_names_of_their_keys() -> None:
    """Names in the code may change; what lies in a LoRA file and in plan.json is read, and written, as before."""
    loras = sorted(STORED.rglob("*watched.safetensors"))
    for file in loras:
        _, metadata = read_lora(file)
        recipe = read_recipe(metadata)
        assert recipe is not None
        assert json.loads(recipe.to_metadata()) == json.loads(metadata["lora_trainer"])
    plans = sorted(STORED.rglob("plan.json"))
    for file in plans:
        plan = json.loads(file.read_text())
        again = json.loads(json.dumps(RunPlan.from_json(plan).as_json()))
        assert again == {key: plan[key] for key in plan if key != "identity"}
    assert (len(loras), len(plans)) == (2, 6)
