"""What a resume refuses, says and takes without a word: each kind of change, tried on a stopped run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import stop_after
from PIL import Image
from safetensors.torch import load_file
from stored_state import rewrite_state
from toys import build_toy_base, write_images
from worlds import run_in_world

from lora_trainer.errors import ConfigError, ExitCode, StoppedBySignal, SystemSetupError
from lora_trainer.evidence.diagnosis.diagnose import diagnose
from lora_trainer.evidence.diagnosis.log import read_run
from lora_trainer.planning import prepare as planning
from lora_trainer.report.runs import read_run as read_record
from lora_trainer.runtime.runtime import Runtime
from lora_trainer.tracking.metrics import step_rows

Train = Callable[..., Path]
Text = pytest.CaptureFixture[str]
CHANGED = "changed since the last start"
WATCHED = "validation={fraction: 0.34, every_steps: 3, max_cost: 1.0}"


def stopped(train_toy: Train, monkeypatch: pytest.MonkeyPatch, *overrides: str, step: int = 3) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(StoppedBySignal):
            train_toy(*overrides)


def weights(run_dir: Path, name: str = "toy") -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"{name}.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(tensor.float(), theirs[name].float(), atol=2e-4) for name, tensor in ours.items())


def move(folder: Path, before: str, after: str) -> None:
    for ending in (".png", ".txt"):
        (folder / f"{before}{ending}").rename(folder / f"{after}{ending}")


def swap(folder: Path) -> None:
    move(folder, "00", "aside")
    move(folder, "01", "00")
    move(folder, "aside", "01")


def repaint(folder: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(folder / "00.png")


def add(folder: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(folder / "06.png")
    (folder / "06.txt").write_text("a seventh\n")


def remove(folder: Path) -> None:
    (folder / "05.png").unlink()


REFUSED = {
    "an image gets a name that sorts elsewhere": (lambda folder: move(folder, "00", "99"), "data order"),
    "two images swap their names": (swap, "data order"),
    "an image is painted anew": (repaint, "data content"),
    "a caption is written anew": (lambda folder: (folder / "00.txt").write_text("another"), "data content"),
    "an image comes": (add, "data content"),
    "an image goes": (remove, "data content"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_images_or_another_order_are_refused(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change, key = REFUSED[kind]
    data = f"data.dir={write_images(tmp_path / 'own')}"
    stopped(train_toy, monkeypatch, data)
    change(tmp_path / "own")
    with pytest.raises(ConfigError, match="began with other settings or contents") as caught:
        train_toy(data)
    assert f"{key}: " in str(caught.value)
    assert ("data content" in str(caught.value)) == (key == "data content")
    allowed = "resume.allow_changes=[data content, data order]"
    assert (train_toy(data, allowed) / "toy.safetensors").is_file()


def test_names_and_places_of_images_base_and_run_are_free(
    train_toy: Train, toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    """All at once: images renamed in their order, their folder, the base and the run directory moved, a new name."""
    overrides = (WATCHED, "export.dtype=fp32")
    straight = weights(train_toy(*overrides, name="straight"), "straight")
    images, base = write_images(tmp_path / "own"), shutil.copytree(toy_base, tmp_path / "base")
    stopped(train_toy, monkeypatch, *overrides, f"data.dir={images}", f"model.path={base}", "train.max_steps=6")
    for number in range(6):
        move(images, f"{number:02d}", f"holiday-{number}")
    images, base = images.rename(tmp_path / "pictures"), base.rename(tmp_path / "sd")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "toy").rename(tmp_path / "elsewhere" / "renamed")
    capsys.readouterr()
    places = (f"data.dir={images}", f"model.path={base}", f"output_dir={tmp_path / 'elsewhere'}")
    train_toy(*overrides, *places, name="renamed")
    said = capsys.readouterr().out
    assert "resuming after step 3 of 6" in said
    assert CHANGED not in said
    renamed = tmp_path / "elsewhere" / "renamed"
    assert_equal(weights(renamed, "renamed"), straight)
    assert not (renamed / "toy.safetensors").exists()
    assert [row["trial"] for row in step_rows(renamed / "metrics.jsonl")] == ["toy"] * 3 + ["renamed"] * 3


def test_the_log_of_a_renamed_run_is_that_of_one_trial(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, step in (("one", 2), ("two", 2)):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(StoppedBySignal):
                train_toy(WATCHED, name=name)
        following = {"one": "two", "two": "three"}[name]
        (tmp_path / "runs" / name).rename(tmp_path / "runs" / following)
    run_dir = train_toy(WATCHED, name="three")
    log, run = read_run(run_dir)
    assert (diagnose(log, run).trial, log.step) == ("three", 6)
    assert log.held_out.steps == [0, 3, 6]
    assert (read_record(run_dir).step, read_record(run_dir).status) == (6, "finished")


def test_another_base_is_refused(train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(train_toy, monkeypatch)
    other = build_toy_base(tmp_path / "other", prediction_type="v_prediction")
    with pytest.raises(ConfigError) as caught:
        train_toy(f"model.path={other}")
    assert "model.prediction_type: epsilon -> v_prediction" in str(caught.value)
    assert "base content: " in str(caught.value)


def test_other_held_out_images_are_refused(train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (f"data.dir={write_images(tmp_path / 'own')}", WATCHED)
    stopped(train_toy, monkeypatch, *data)
    with pytest.raises(ConfigError, match=r"validation\.fraction: 0\.34 -> 0\.5"):
        train_toy(data[0], WATCHED.replace("0.34", "0.5"))


def test_a_start_that_ended_before_its_first_checkpoint_fixes_no_held_out_images(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before anything was saved: what the config says now counts."""
    seed = "validation={fraction: 0.34, seed: %d, every_steps: 3, max_cost: 1.0}"
    chosen = [(train_toy(seed % n, name=f"run{n}") / "validation.json").read_bytes() for n in (1, 2, 3, 4)]
    assert len(set(chosen)) > 1
    run_dir = train_toy(seed % 1)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "toy.safetensors").unlink()
    other = next(n for n in (2, 3, 4) if chosen[n - 1] != chosen[0])
    assert (train_toy(seed % other) / "validation.json").read_bytes() == chosen[other - 1]


FACTS = {
    "torch": "9.9",
    "diffusers": "9.9",
    "peft": "9.9",
    "accelerate": "9.9",
    "device": "another GPU",
}


@pytest.mark.parametrize("fact", FACTS)
def test_another_library_or_device_is_said_once_and_goes_on(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, capsys: Text, fact: str
) -> None:
    stopped(train_toy, monkeypatch)
    honest = Runtime.facts
    monkeypatch.setattr(Runtime, "facts", lambda self: honest(self) | {fact: FACTS[fact]})
    capsys.readouterr()
    stopped(train_toy, monkeypatch, step=1)
    said = capsys.readouterr().out
    assert said.count(CHANGED) == 1
    assert f"{CHANGED}: {fact}: " in said
    assert f" -> {FACTS[fact]}" in said
    train_toy()  # its checkpoint knows by now
    assert CHANGED not in capsys.readouterr().out


def test_another_precision_is_refused_and_auto_is_what_it_became(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    stopped(train_toy, monkeypatch)
    with pytest.raises(ConfigError, match=r"train\.precision: fp32 -> bf16"):
        train_toy("train.precision=bf16")
    train_toy("train.precision=fp32")
    assert CHANGED not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.threads=2", "train.threads: 1 -> 2"),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing: False -> True"),
        ("validation.batch_size=3", "validation.batch_size: 8 -> 3"),
    ],
)
def test_what_moves_only_rounding_or_speed_is_said(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, capsys: Text, override: str, said: str
) -> None:
    straight = train_toy(WATCHED, name="straight")
    stopped(train_toy, monkeypatch, WATCHED)
    capsys.readouterr()
    run_dir = train_toy(WATCHED, override)
    assert f"{CHANGED}: {said}" in capsys.readouterr().out
    assert close(weights(run_dir), weights(straight, "straight"))


def test_threads_auto_goes_on_with_those_of_the_first_machine(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    auto = "train.threads=auto"
    monkeypatch.setattr(planning, "default_threads", lambda launch: 1)
    straight = train_toy(auto, name="straight")
    stopped(train_toy, monkeypatch, auto)
    monkeypatch.setattr(planning, "default_threads", lambda launch: 3)
    capsys.readouterr()
    run_dir = train_toy(auto)
    assert torch.get_num_threads() == 1
    assert CHANGED not in capsys.readouterr().out
    assert_equal(weights(run_dir), weights(straight, "straight"))


class TestTheBatch:
    """Two images per update, in one micro-batch of one process."""

    def test_may_be_split_in_another_way(self, train_toy: Train, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
        straight = train_toy(name="straight")
        stopped(train_toy, monkeypatch)
        capsys.readouterr()
        run_dir = train_toy("train.batch_size=1", "train.gradient_accumulation_steps=2")
        said = capsys.readouterr().out
        assert f"{CHANGED}: train.batch_size: 2 -> 1" in said
        assert f"{CHANGED}: train.gradient_accumulation_steps: 1 -> 2" in said
        ours, theirs = (step_rows(each / "metrics.jsonl") for each in (run_dir, straight))
        assert [(row["lr"], row["epoch"]) for row in ours] == [(row["lr"], row["epoch"]) for row in theirs]
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
        assert close(weights(run_dir), weights(straight, "straight"))

    @pytest.mark.process
    def test_may_be_split_over_processes(
        self, train_toy: Train, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        straight = train_toy(name="straight")
        stopped(train_toy, monkeypatch)
        capfd.readouterr()
        assert run_in_world(2, lambda: train_toy("train.batch_size=1")) == [0, 0]
        said = capfd.readouterr().out
        assert f"{CHANGED}: num_processes: 1 -> 2" in said
        assert f"{CHANGED}: train.batch_size: 2 -> 1" in said
        assert close(weights(straight.with_name("toy")), weights(straight, "straight"))

    @pytest.mark.parametrize("override", ["train.batch_size=1", "train.gradient_accumulation_steps=2"])
    def test_keeps_its_size(self, train_toy: Train, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
        stopped(train_toy, monkeypatch)
        with pytest.raises(ConfigError, match=r"global batch: 2 -> [14]"):
            train_toy(override)

    @pytest.mark.process
    def test_keeps_its_size_over_processes(self, train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped(train_toy, monkeypatch)
        assert run_in_world(2, lambda: train_toy()) == [ExitCode.CONFIG] * 2


def newest(tmp_path: Path, name: str = "toy") -> Path:
    return max((tmp_path / "runs" / name / "checkpoints").iterdir())


def test_what_an_older_identity_lacks_counts_as_default_or_as_unchanged(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    straight = train_toy(name="straight")
    stopped(train_toy, monkeypatch)

    def forget(state: dict[str, Any]) -> None:
        for key in ("adapter.use_dora", "train.ema_decay", "data order", "peft"):
            del state["trials"]["toy"]["identity"][key]

    rewrite_state(newest(tmp_path), forget)
    with pytest.raises(ConfigError, match=r"adapter\.use_dora: False -> True"):
        train_toy("adapter.use_dora=true")
    capsys.readouterr()
    stopped(train_toy, monkeypatch, step=1)
    said = capsys.readouterr().out
    assert said.count("not recorded by the earlier version, taken as unchanged: data order, peft") == 1
    assert CHANGED not in said
    run_dir = train_toy()
    assert "not recorded" not in capsys.readouterr().out
    assert_equal(weights(run_dir), weights(straight, "straight"))


def test_a_group_says_once_what_all_its_trials_have_in_common(
    sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:

    section = "{grid: {optimizer.lr: [1e-3, 2e-3, 3e-3]}}"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(StoppedBySignal):
            sweep(section)
    honest = Runtime.facts
    monkeypatch.setattr(Runtime, "facts", lambda self: honest(self) | {"torch": "9.9"})
    capsys.readouterr()
    sweep(section)
    assert capsys.readouterr().out.count(CHANGED) == 1


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_checkpoint_of_a_newer_version_is_refused_untouched(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(train_toy, monkeypatch, "checkpoint.every_steps=1")
    checkpoint = newest(tmp_path)
    rewrite_state(checkpoint, lambda state: state.update(format=3, novelty={}), manifest_format=3)
    before = tree(checkpoint.parent)
    with pytest.raises(SystemSetupError, match="format 3, and this version reads up to 2"):
        train_toy("checkpoint.every_steps=1")
    assert tree(checkpoint.parent) == before


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("unreadable", ["manifest.json", "state.json", "adapter.safetensors"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, unreadable: str
) -> None:
    stopped(train_toy, monkeypatch, "checkpoint.every_steps=1")
    checkpoint = newest(tmp_path)
    before, honest = tree(checkpoint.parent), Path.open

    def fails(self: Path, *arguments: Any, **named: Any) -> Any:
        if self.name == unreadable and self.parent == checkpoint:
            raise OSError(code, os.strerror(code), str(self))
        return honest(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fails)
        with pytest.raises(SystemSetupError, match="a checkpoint cannot be read now") as caught:
            train_toy("checkpoint.every_steps=1")
    assert str(checkpoint / unreadable) in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert tree(checkpoint.parent) == before
    if code == errno.EIO:
        assert (train_toy("checkpoint.every_steps=1") / "toy.safetensors").is_file()
