"""What launchers leave in the environment is honoured or refused, never passed over."""

from __future__ import annotations

import pytest

from lora_trainer.config.schema import RunConfig
from lora_trainer.errors import ExitCode, HostError
from lora_trainer.runtime import launch as launch_module
from lora_trainer.runtime.launch import Launch, default_threads, read_launch


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("ACCELERATE_") or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
            monkeypatch.delenv(name)


def config(**train: object) -> RunConfig:
    sections = {"name": "x", "model": {"path": "b"}, "data": {"dir": "d"}, "train": {"max_steps": 1, **train}}
    return RunConfig.model_validate(sections)


def test_a_plain_start_is_one_process() -> None:
    assert read_launch(config()) == Launch(1, 0, 1)


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    launch = read_launch(config())
    assert launch == Launch(4, 3, 2)
    assert not launch.is_main
    assert default_threads(launch) >= 1


def test_threads_are_no_more_than_the_cores_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    assert default_threads(Launch()) == 3
    assert default_threads(Launch(num_processes=2, num_local_processes=2)) == 1


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "inductor"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision fp16, the config says train.precision: bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "says 4 gradient accumulation steps, the config says 2"),
    ],
)
def test_settings_that_would_not_be_honoured(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(HostError, match=said) as caught:
        read_launch(config(precision="bf16", gradient_accumulation_steps=2))
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
    ],
)
def test_settings_that_agree(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert read_launch(config(precision="bf16", gradient_accumulation_steps=2)).num_processes == 1


def test_two_processes_asked_for_and_one_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    command = ["accelerate", "launch", "--num_processes", "2"]
    monkeypatch.setattr(launch_module, "_launcher", lambda: (command, {"PATH": ""}))
    with pytest.raises(HostError, match="asked for 2 processes") as caught:
        read_launch(config())
    assert "torchrun --nproc_per_node 2 train.py" in str(caught.value)


def test_an_address_that_the_user_exported_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setattr(launch_module, "_launcher", lambda: ([], {"PATH": "", "MASTER_ADDR": "10.0.0.1"}))
    assert read_launch(config()).num_processes == 1
