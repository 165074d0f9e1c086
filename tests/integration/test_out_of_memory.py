"""A device that refuses memory anywhere: exit 5 in one message, and its keys, typed as printed, go on from there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from faults import refuse_memory, stop_after
from toys import WATCHED
from worlds import run_in_world

from lora_trainer.cli import export as export_command
from lora_trainer.cli.program import main
from lora_trainer.cli.train import train
from lora_trainer.config.identity import compare, identity_fields
from lora_trainer.config.load import load_config
from lora_trainer.data import images
from lora_trainer.errors import ExitCode, refused_memory
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.planning.saving import Phase, saving_keys
from lora_trainer.storage.checkpoint import open_checkpoint
from lora_trainer.training import writers
from lora_trainer.training.denoiser import Sampler
from lora_trainer.training.optimizer_step import OptimizerStep
from lora_trainer.training.trial import Trial
from lora_trainer.training.validation import Validator

Start = Callable[..., list[tuple[str, ...]]]
Place = tuple[Any, str]

FORWARD, BACKWARD = (OptimizerStep, "_losses"), (torch.Tensor, "backward")
PROBE, SAMPLE = (Validator, "_losses"), (Sampler, "_draw_one")
ALL_KEYS = "train.batch_size=1 train.gradient_accumulation_steps=4 train.gradient_checkpointing=true"
SAMPLES = "sample={prompts: [a cat], every_steps: 2, num_inference_steps: 1}"


@pytest.fixture
def start(toy_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Start:
    """The program under an output folder; where memory is refused, the sets of keys that its one message prints."""
    settings = {
        "train": "{batch_size: 2, gradient_accumulation_steps: 2, max_steps: 4, threads: 1, ema_decay: 0.9}",
        "validation": "{fraction: 0.34, every_steps: 2, max_cost: 1.0, batch_size: 32}",
        "lr_scheduler": "{type: plateau, patience: 1}",
        "data.cache_dir": tmp_path / "cache",
        "tracking.base_loss_every": "null",
    }

    def run(output: str, *overrides: str, code: int = 0) -> list[tuple[str, ...]]:
        capsys.readouterr()
        given = [f"{key}={value}" for key, value in settings.items()]
        with pytest.raises(SystemExit) as end:
            main(["train", "-c", str(toy_config), *given, f"output_dir={tmp_path / output}", *overrides])
        out, shown = capsys.readouterr()
        print(out)
        assert (end.value.code or 0) == code, shown
        if code != ExitCode.ENVIRONMENT:
            return []
        exits = json.loads((tmp_path / output / "toy" / "exit.json").read_text())
        assert (exits["code"], shown.count("out of memory in the phase"), "Traceback" in shown) == (code, 1, False)
        assert exits["message"] in shown
        lines = shown.partition("to the same command:\n")[2].splitlines()
        return [tuple(shlex.split(line)) for line in lines if not line.strip().startswith("or free memory")]

    return run


def loras(output: Path) -> dict[str, bytes]:
    """The LoRA files of a run, or of the trials of a sweep."""
    files = [file for file in output.rglob("*.safetensors") if not {"checkpoints", "cache"} & set(file.parts)]
    assert files
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("place", "call", "sets"),
    [
        pytest.param(FORWARD, 5, [ALL_KEYS.rpartition(" ")[0], ALL_KEYS], id="forward of the second micro-step"),
        pytest.param(PROBE, 2, [f"validation.batch_size={size}" for size in (16, 8, 4, 2, 1)], id="probe"),
    ],
)
def test_each_set_of_keys_goes_on_after_the_last_update_that_was_done(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, call: int, sets: list[str]
) -> None:
    """As a run does that was stopped after that update and was given the keys then."""
    with monkeypatch.context() as patch:
        refuse_memory(patch, place, call=call, operation=30)
        printed = start("refused", code=ExitCode.ENVIRONMENT)
    assert printed == [tuple(line.split()) for line in sets]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        start("stopped", code=ExitCode.STOPPED)
    for keys in printed if place == FORWARD else printed[:1]:
        for output in ("refused", "stopped"):
            shutil.copytree(tmp_path / output, tmp_path / "copies" / output, dirs_exist_ok=True)
            start(f"copies/{output}", *keys)
        assert loras(tmp_path / "copies" / "refused") == loras(tmp_path / "copies" / "stopped")
        shutil.rmtree(tmp_path / "copies")


def test_a_run_that_is_refused_everywhere_is_the_undisturbed_one(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start is refused a little later; what it prints is added to the command of the next."""
    keys: list[str] = ["checkpoint.every_steps=3", SAMPLES]
    places: list[tuple[str, Place, int, int, list[str]]] = [
        ("encode an image", (StableDiffusion, "encode_images"), 3, 0, []),
        ("load the denoiser", (StableDiffusion, "load_denoiser"), 0, 0, []),
        ("forward of update 1", FORWARD, 0, 0, ALL_KEYS.split()),
        ("the base's probe", PROBE, 0, 0, ["validation.batch_size=16"]),
        ("the base's sample", SAMPLE, 0, 0, ["sample={}"]),
        ("optimizer step of update 1", (Trial, "apply_update"), 0, 0, []),
        ("backward of update 2: saved after update 1", BACKWARD, 4, 1, []),
        ("optimizer step of update 2, half done", (Trial, "apply_update"), 0, 1, []),
        ("probe after update 2", PROBE, 0, 2, []),
        ("the best LoRA, after the probe that was owed", (writers, "write_lora"), 0, 2, []),
        ("norm in update 3", (Trial, "clip"), 0, 2, []),
        ("checkpoint after update 3: it is tried again", (writers, "save_checkpoint"), 0, 3, []),
        ("the last LoRA", (writers, "write_lora"), 0, 4, []),
    ]
    for name, place, call, saved, added in places:
        with monkeypatch.context() as patch:
            refuse_memory(patch, place, call=call, operation=2)
            printed = start("refused", *keys, code=ExitCode.ENVIRONMENT)
        checkpoints = tmp_path / "refused" / "toy" / "checkpoints"
        assert (open_checkpoint(checkpoints, None).state["step"] if checkpoints.exists() else 0) == saved, name
        assert not added or tuple(added) in printed, name
        keys += added
    start("refused", *keys)
    start("straight", *keys)
    assert loras(tmp_path / "refused") == loras(tmp_path / "straight")


def test_a_packed_sweep_goes_on_with_fewer_trials_in_a_pass(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = "sweep={grid: {optimizer.lr: [1e-3, 2e-3]}, trials_per_pass: auto}"
    with monkeypatch.context() as patch:
        refuse_memory(patch, FORWARD, call=5, operation=30)  # one call measures what fits into a pass
        printed = start("refused", section, code=ExitCode.ENVIRONMENT)
    assert [keys[0] for keys in printed] == ["sweep.trials_per_pass=1"] * 3
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        start("stopped", section, code=ExitCode.STOPPED)
    for output in ("refused", "stopped"):
        start(output, section, *printed[0])
        assert "sweep.trials_per_pass: 2 -> 1" in capsys.readouterr().out
    assert loras(tmp_path / "refused") == loras(tmp_path / "stopped")


@pytest.mark.process
@pytest.mark.parametrize(
    ("place", "call", "saved"),
    [
        pytest.param(BACKWARD, 1, 2, id="backward"),  # update 2 has images for one process alone
        pytest.param((Trial, "apply_update"), 1, 2, id="optimizer step, which the other makes"),
    ],
)
def test_a_process_that_is_refused_ends_all(
    toy_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, call: int, saved: int
) -> None:
    def run(output: str) -> None:
        train(toy_config, [f"output_dir={tmp_path / output}", "train.max_steps=3", "checkpoint.every_steps=1"])

    def refuse() -> None:
        if os.environ["RANK"] == "1":
            refuse_memory(monkeypatch, place, call=call, operation=9)
        run("refused")

    assert run_in_world(2, refuse) == [ExitCode.ENVIRONMENT] * 2
    run_dir = tmp_path / "refused" / "toy"
    assert open_checkpoint(run_dir / "checkpoints", None).state["step"] == saved
    assert json.loads((run_dir / "exit.json").read_text())["code"] == ExitCode.ENVIRONMENT
    if place == BACKWARD:
        assert run_in_world(2, lambda: run("refused")) == run_in_world(2, lambda: run("straight")) == [0, 0]
        assert loras(tmp_path / "refused") == loras(tmp_path / "straight")


@pytest.mark.parametrize("phase", get_args(Phase))
def test_every_set_of_keys_is_valid_and_admitted_by_a_resume(toy_config: Path, phase: str) -> None:
    written = (
        "train={max_steps: 5, batch_size: 6, gradient_accumulation_steps: 3, precision: fp32}",
        "resume.allow_changes=[seed]",
        "validation.fraction=0.3",
        SAMPLES,
        "sweep={grid: {optimizer.lr: [1e-3, 1e-4]}, trials_per_pass: 6}",
    )
    config = load_config(toy_config, written)
    for keys in saving_keys(config, phase, on_gpu=True):
        now = load_config(toy_config, [*written, *keys])
        before, after = (
            identity_fields(each) | {"global batch": each.train.batch_size * each.train.gradient_accumulation_steps}
            for each in (config, now)
        )
        after |= {"train.precision": "bf16"} if now.train.precision == "auto" else {}
        assert now != config
        assert not compare(before, after, now.resume, "").refused


def refuse(*_: Any) -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda *_: torch.empty(2**50, dtype=torch.uint8), id="torch on the CPU"),
        pytest.param(lambda *_: np.empty(2**50, dtype=np.uint8), id="numpy"),
        pytest.param(lambda *_: bytearray(2**62), id="Python"),
        pytest.param(refuse, id="the kernel"),
    ],
)
def test_memory_that_any_command_is_refused_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ask: Callable[..., Any]
) -> None:
    monkeypatch.setattr(export_command, "convert_file", ask)
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path / "x.safetensors"), "-o", str(tmp_path / "y.safetensors")])
    assert end.value.code == ExitCode.ENVIRONMENT
    assert "out of memory" in capsys.readouterr().err


def test_a_picture_that_finds_no_room_is_not_called_broken(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = StableDiffusion.load_vae

    def load_vae(self: StableDiffusion, device: torch.device) -> Any:
        monkeypatch.setattr(images, "_decode", lambda data: bytearray(2**62))  # all are checked by then
        return honest(self, device)

    monkeypatch.setattr(StableDiffusion, "load_vae", load_vae)
    assert start("refused", code=ExitCode.ENVIRONMENT) == []


@pytest.mark.parametrize("command", [["find-lr"], ["sweep", "--dry-run", "--measure", "sweep={}"]])
def test_what_only_measures_ends_in_the_same_words(
    toy_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    refuse_memory(monkeypatch, FORWARD, operation=9)
    with pytest.raises(SystemExit) as end:
        main([*command, "-c", str(toy_config), WATCHED])
    shown = capsys.readouterr().err
    assert end.value.code == ExitCode.ENVIRONMENT
    assert "out of memory in the phase `forward`" in shown
    assert "Traceback" not in shown


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_card_that_is_full(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver itself refuses in the backward of an update, and the printed keys go on."""
    honest, calls = torch.Tensor.backward, itertools.count()

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 2:
            torch.empty(2**45, dtype=torch.uint8, device="cuda")
        honest(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        printed = start("refused", code=ExitCode.ENVIRONMENT)
    assert printed
    for keys in printed:
        shutil.copytree(tmp_path / "refused", tmp_path / "copy", dirs_exist_ok=True)
        start("copy", *keys)
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("could not create a primitive"),
        SystemError("error return without exception set"),
    ],
)
def test_memory_is_refused_in_many_words(error: Exception) -> None:
    outer = RuntimeError("Failed to import diffusers.models.unets")
    outer.__cause__ = error
    assert refused_memory(error) is not None
    assert refused_memory(outer) == refused_memory(error)
    assert refused_memory(RuntimeError("shapes differ")) is None
