"""What launchers leave in the environment is honoured or refused, never passed over."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lora_trainer.config.schema import RunConfig
from lora_trainer.errors import ExitCode, SystemSetupError
from lora_trainer.runtime import launch as launch_module
from lora_trainer.runtime.launch import Launch, default_threads, read_launch

PLACES = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | {
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("ACCELERATE_") or name in (*PLACES, *launch_module._MPI_SIZES):
            monkeypatch.delenv(name)


def config(**train: object) -> RunConfig:
    sections = {"name": "x", "model": {"path": "b"}, "data": {"dir": "d"}, "train": {"max_steps": 1, **train}}
    return RunConfig.model_validate(sections)


def test_a_plain_start_is_one_process() -> None:
    assert read_launch(config()) == Launch(1, 0, 1)


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLACES.items():
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
    with pytest.raises(SystemSetupError, match=said) as caught:
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
    with pytest.raises(SystemSetupError, match="asked for 2 processes") as caught:
        read_launch(config())
    assert "torchrun --nproc_per_node 2 train.py" in str(caught.value)


def test_an_address_that_the_user_exported_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setattr(launch_module, "_launcher", lambda: ([], {"PATH": "", "MASTER_ADDR": "10.0.0.1"}))
    assert read_launch(config()).num_processes == 1


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"WORLD_SIZE": "two"}, "no whole number"),
        ({"RANK": "-1"}, "no whole number"),
        ({"RANK": "1"}, "contradict each other"),
        ({"WORLD_SIZE": "0"}, "contradict each other"),
        ({"LOCAL_RANK": "3"}, "contradict each other"),
        (PLACES | {"RANK": "4"}, "contradict each other"),
        (PLACES | {"LOCAL_RANK": "2"}, "contradict each other"),
        ({"WORLD_SIZE": "2"}, "2 processes are announced"),
        (PLACES | {"MASTER_PORT": ""}, "4 processes are announced"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "MPI started 2 processes"),
        ({"PMI_SIZE": "3", "WORLD_SIZE": "1"}, "MPI started 3 processes"),
    ],
)
def test_places_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], what: str) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemSetupError, match=what) as caught:
        read_launch(config())
    for problem in caught.value.problems:  # the fix, as it is printed
        assert problem.fix is not None
        for name in problem.fix.rpartition("unset ")[2].split():
            monkeypatch.delenv(name, raising=False)
    assert read_launch(config()) == Launch()


@pytest.mark.parametrize(
    "said", [{"LOCAL_RANK": "0"}, {"WORLD_SIZE": "", "RANK": ""}, {"PMI_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}]
)
def test_what_a_shell_inherits_of_a_world_of_one_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str]
) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    launch = read_launch(config())
    assert launch == Launch()
    launch_module.forget_launcher()
    assert not {"LOCAL_RANK", *launch_module._MPI_SIZES} & set(os.environ)


@pytest.mark.parametrize(
    ("variable", "value"),
    [(launch_module._PRECISION, word) for word in ("fp16", "bf16", "fp8")]
    + [(launch_module._ACCUMULATION, word) for word in ("4", "0", "four")],
)
def test_the_fixes_for_accelerates_settings_are_fixes(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemSetupError) as caught:
        read_launch(config())
    fix = str(caught.value.problems[0].fix)
    if (written := re.search(r"write train\.(\w+)=(\w+)", fix)) is not None:
        read_launch(config(**{written[1]: int(written[2]) if written[2].isdecimal() else written[2]}))
    if "--mixed_precision no" in fix:
        monkeypatch.setenv(variable, "no")
    else:
        assert f"unset {variable}" in fix
        monkeypatch.delenv(variable)
    read_launch(config())


@pytest.mark.parametrize(
    ("group", "file", "text", "granted"),
    [
        ("0::/a/b", "a/b/cpu.max", "250000 100000", 2),
        ("0::/a/b", "a/cpu.max", "100000 100000", 1),
        ("0::/", "cpu.max", "50000 100000", 1),
        ("0::/a/b", "a/cpu.max", "max 100000", 8),
        ("3:cpu,cpuacct:/docker/x", "cpu/cpu.cfs_quota_us", "300000", 3),
        ("3:cpu,cpuacct:/docker/x", "cpu/cpu.cfs_quota_us", "-1", 8),
        ("3:memory:/docker/x", "memory/cpu.max", "100000 100000", 8),
    ],
)
def test_a_containers_quota_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: str, file: str, text: str, granted: int
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / file).with_name("cpu.cfs_period_us").write_text("100000")
    monkeypatch.setattr(launch_module, "CGROUPS", tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda path: f"{group}\n" if path.name == "cgroup" else path.open().read())
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert default_threads(Launch()) == granted
