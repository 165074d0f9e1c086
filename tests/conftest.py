"""Fixtures shared by all tests: a toy base, image folders, and a way to train in this process."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait take the other tests' cores
sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parent.parent
collect_ignore = ["example_plugin"]  # a package of its own, whose tests run where it is installed
STARTS_A_PROCESS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
"""Audit events of Python."""
COLLECTED = pytest.StashKey[set[str]]()
"""Node ids, also of tests that are deselected."""

TOY_CONFIG = """
name: toy
output_dir: {output}
model: {{path: {base}}}
data: {{dir: {images}, resolution: 64}}
adapter: {{rank: 4, alpha: 4, targets: attention}}
optimizer: {{type: adamw, lr: 1e-3}}
lr_scheduler: {{type: cosine, warmup_steps: 2}}
train: {{max_steps: 6, batch_size: 2, threads: 1}}
checkpoint: {{every_steps: null}}
tracking: {{tensorboard: false}}
"""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COLLECTED] = set()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.config.stash[COLLECTED].add(item.nodeid)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="unit tests and golden runs, without any that starts a process"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("quick"):
        return
    left_out = [item for item in items if not is_quick(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if is_quick(item)]


def is_quick(item: pytest.Item) -> bool:
    """Whether it belongs to `--quick`: every unit test, and of the others what says so, but no test of processes."""
    chosen = item.get_closest_marker("quick") or item.path.is_relative_to(ROOT / "tests" / "unit")
    return bool(chosen) and item.get_closest_marker("process") is None


_may_start_processes = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that is not marked `process` can start none: that would raise where it is tried."""
    global _may_start_processes
    _may_start_processes = item.get_closest_marker("process") is not None
    try:
        return (yield)
    finally:
        _may_start_processes = True


def _refuse_processes(event: str, _: tuple[object, ...]) -> None:
    if event in STARTS_A_PROCESS and not _may_start_processes:
        raise AssertionError("this test starts a process: mark it with pytest.mark.process")


sys.addaudithook(_refuse_processes)


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toys import build_toy_base

    base = build_toy_base(tmp_path_factory.mktemp("base"))
    gc.freeze()  # the libraries' million objects: a run collects garbage three times, which would go through them
    return base


@pytest.fixture(scope="session")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toys import write_images

    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def plain_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process write pictures of one pixel, as drawing takes as long as their training; see `pictures`."""
    from toys import write_plain_pictures

    if request.node.get_closest_marker("pictures") is None:
        write_plain_pictures(monkeypatch.setattr)


@pytest.fixture
def toy_config(tmp_path: Path, toy_base: Path, toy_images: Path, plain_pictures: None) -> Path:
    """A configuration file for a run of six updates under `tmp_path/runs/toy`."""
    file = tmp_path / "toy.yaml"
    file.write_text(TOY_CONFIG.format(output=tmp_path / "runs", base=toy_base, images=toy_images))
    return file


@pytest.fixture
def train_toy(toy_config: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train the toy config with overrides in this process; the run directory."""
    from lora_trainer.cli.train import train

    def run(*overrides: str, name: str = "toy") -> Path:
        train(toy_config, [f"name={name}", *overrides])
        return tmp_path / "runs" / name

    return run


@pytest.fixture
def sweep(toy_config: Path, tmp_path: Path) -> Callable[..., Path]:
    """Sweep over the toy config in this process, with a probe; the sweep's directory."""
    from toys import WATCHED

    from lora_trainer.cli.train import sweep as command

    def run(section: str, *overrides: str, name: str = "toy", **options: bool) -> Path:
        command(toy_config, [f"name={name}", WATCHED, f"sweep={section}", *overrides], **options)
        return tmp_path / "runs" / name

    return run


@pytest.fixture
def private_names(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """User and host of this process, under names that stand in no file by chance."""
    user, host = "the-user-of-this-test", "the-host-of-this-test"
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, user)
    monkeypatch.setattr("socket.gethostname", lambda: host)
    monkeypatch.setattr("platform.node", lambda: host)
    return user, host


@pytest.fixture
def program() -> Callable[..., object]:
    """Start a command in a process of its own, with this interpreter's packages and without network."""
    import subprocess

    def start(command: Sequence[str], timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_", "RANK", "WORLD"))}
        paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            list(command), cwd=ROOT, env=clean | paths | environment, timeout=timeout, capture_output=True, text=True
        )

    return start
