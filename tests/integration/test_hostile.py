"""Whatever is given to the program is answered with a documented code, one message, in seconds, within a gigabyte.

By rule: tests/hostile.py spoils good files and words. Each command runs in a fork of this process, which has everything
imported. HOSTILE=all in the environment tries every case; without it every n-th of each kind.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import pytest
from conftest import TOY_CONFIG
from forks import Outcome, in_fork
from ruamel.yaml import YAML
from toys import WATCHED, write_plain_pictures

import lora_trainer
from lora_trainer.cli.program import main

pytestmark = pytest.mark.process
Case = tuple[str, list[str]]
UNREAL = ("\0", "-1", "nan", "1e999", "9" * 5000, "", "x", hostile.ESCAPES, "caf\udcff", "10000000000000000000")


@dataclass(frozen=True)
class World:
    """Good things to spoil."""

    folder: Path
    base: Path
    config: Path
    swept: Path
    run: Path
    sweep: Path

    @property
    def lora(self) -> Path:
        return self.run / f"{self.run.name}.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, toy_base: Path, toy_images: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hostile")
    base = shutil.copytree(toy_base, folder / "base")
    config, swept = folder / "toy.yaml", folder / "swept.yaml"
    text = TOY_CONFIG.format(output=folder / "runs", base=base, images=toy_images)
    watched = f"validation: {WATCHED.partition('=')[2]}\nsample: {{every_steps: null, num_inference_steps: 1}}\n"
    config.write_text(text + watched)
    swept.write_text(
        text.replace("name: toy", "name: many") + watched + "sweep: {grid: {optimizer.lr: [1e-4, 1e-3]}, seeds: [1]}\n"
    )
    for module in pkgutil.walk_packages(lora_trainer.__path__, "lora_trainer."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with pytest.MonkeyPatch.context() as patch:
        write_plain_pictures(patch.setattr)
        for arguments in (["train", "-c", str(config)], ["sweep", "-c", str(swept)], ["schedules", "list"]):
            with pytest.raises(SystemExit, match="0"):
                main(arguments)
        gc.collect()
        gc.freeze()
        yield World(folder, base, config, swept, folder / "runs" / "toy", folder / "runs" / "many")


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., None]:
    """Run cases in forks; at least so many, and all as they should be."""

    def run(cases: Iterable[Case], at_least: int, every: int = 1) -> None:
        listed, faults = 0, {}
        for number, (label, arguments) in enumerate(cases):
            if number % every and os.environ.get("HOSTILE") != "all":
                continue
            listed += 1
            outcome = in_fork(arguments, tmp_path)
            if found := outcome.faults():
                faults[f"{label} -> {' '.join(arguments)[:200]!a}"] = f"{found}\n{_tail(outcome)}"
        assert not faults, "\n\n".join([f"{len(faults)} of {listed}", *(f"{k}\n{v}" for k, v in faults.items())])
        assert listed >= at_least

    return run


def _tail(outcome: Outcome) -> str:
    return f"{outcome.out[-200:]!a}\n{outcome.err[-900:].encode('ascii', 'backslashreplace').decode()}"


def spoilt(file: Path, contents: hostile.Labelled, *commands: list[str]) -> Iterator[Case]:
    """The file with each content, given to each command in turn; it is good again at the end."""
    good = file.read_bytes()
    try:
        for number, (label, content) in enumerate(contents):
            file.write_bytes(content)
            yield f"{file.name}: {label}", commands[number % len(commands)]
    finally:
        file.write_bytes(good)


def places_taken(file: Path) -> Iterator[str]:
    """In the file's place what can never be read, one after the other."""
    aside = file.rename(file.with_name("aside"))
    try:
        for kind, make in {
            "folder": file.mkdir,
            "pipe": lambda: os.mkfifo(file),
            "endless": lambda: file.symlink_to("/dev/zero"),
            "loop": lambda: file.symlink_to(file),
            "nowhere": lambda: file.symlink_to("/none/none"),
            "huge": lambda: os.truncate(os.open(file, os.O_CREAT | os.O_RDWR), 2**40),
        }.items():
            make()
            yield kind
            file.rmdir() if file.is_dir() else file.unlink()
    finally:
        aside.rename(file)


def taken(file: Path, *commands: list[str]) -> Iterator[Case]:
    for number, kind in enumerate(places_taken(file)):
        yield f"{file.name}: {kind}", commands[number % len(commands)]


def settings_of(file: Path) -> dict[str, Any]:
    return json.loads(json.dumps(YAML(typ="safe").load(file)))


def test_yaml(world: World, judge: Callable[..., None]) -> None:
    file = str(world.config)
    verbs = [[verb, "-c", file] for verb in ("check", "plan")] + [["train", "-c", file, "--dry-run"]]
    judge(spoilt(world.config, hostile.yaml_files(world.config.read_text()), *verbs), 35, every=2)
    judge(taken(world.config, *verbs), 3, every=2)


def test_settings(world: World, judge: Callable[..., None]) -> None:
    file, settings = str(world.config), settings_of(world.config)
    verbs = [[verb, "-c", file] for verb in ("plan", "check")]
    verbs += [[verb, "-c", file, "--dry-run"] for verb in ("train", "sweep")]
    judge(spoilt(world.config, hostile.configurations(settings), *verbs), 30, every=89)


def test_overrides(world: World, judge: Callable[..., None]) -> None:
    verbs = ["check", "plan", "sweep"]
    more = ("", "=", "a", "=b", ".a=1", "a.=1", "a..b=1", "seed.x=1", "x" * 10**6, "data.sources.0.dir=x", "--x", "-1")
    words = [*more, *hostile.overrides()]
    cases = (
        (word[:80], [verbs[n % 3], "-c", str(world.swept), *["--dry-run"] * (n % 3 == 2), "--", word])
        for n, word in enumerate(words)
    )
    judge(cases, 50, every=109)


def test_options(world: World, judge: Callable[..., None]) -> None:
    config, out = ["-c", str(world.config)], ["-o", str(world.folder / "out.safetensors")]
    lora = ["sample", "--lora", str(world.lora), "--prompt", "x", "--steps", "1", "--size", "32"]
    options = {
        "--processes": ["plan", *config],
        "--steps": ["schedules", "plot"],
        "--lr": ["schedules", "plot"],
        "--epoch-steps": ["schedules", "explain", "step"],
        "--step": ["export", str(world.run), *out],
        "--weights": ["export", str(world.run), *out],
        "--model": ["export", str(world.lora), *out],
        "--min-effect": ["report", str(world.run)],
        "--confirm": ["report", str(world.run)],
        "-c": ["check"],
        "--size": lora[:-2],
        "--guidance": lora,
        "--scale": lora,
        "--seed": lora,
        "--steps ": lora[:-4],
        "-n": lora[:5],
        "--revision": lora,
    }
    cases = [
        (f"{name}={v[:9]!a}", [*command, f"{name.strip()}={v}" if name[1] == "-" else f"{name}{v}"])
        for name, command in options.items()
        for v in UNREAL
    ]
    judge(cases, 25, every=7)


def test_paths(world: World, judge: Callable[..., None]) -> None:
    odd = world.folder / "od\x1b[31md\u202e"
    odd.mkdir(exist_ok=True)
    notes = world.folder / "notes.png"
    notes.write_text("mine")
    os.mkfifo(world.folder / "pipe.safetensors")
    paths = [
        "a\0b",
        "x" * 300,
        "/".join("ab" * 1200),
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/",
        "",
        str(notes),
        str(odd),
        str(odd / "x.png"),
        "~nosuchuser/x",
        "caf\udcff",
        str(world.folder / "pipe.safetensors"),
        "\ud800.png",
    ]
    commands = {
        "run": lambda p: ["diagnose", p],
        "runs": lambda p: ["report", p, str(world.run)],
        "page": lambda p: ["report", str(world.run), "-o", p],
        "picture": lambda p: ["schedules", "plot", "-o", p],
        "source": lambda p: ["export", p, "-o", str(world.folder / "y.safetensors")],
        "target": lambda p: ["export", str(world.lora), "-o", p],
        "lora": lambda p: ["sample", "--lora", p, "--prompt", "x", "--model", str(world.base)],
        "config": lambda p: ["schedules", "plot", "-c", p],
    }
    judge([(f"{k}: {p[:20]!a}", make(p)) for p in paths for k, make in commands.items()], 30, every=4)
    assert notes.read_text() == "mine"


def test_schedules(world: World, judge: Callable[..., None]) -> None:
    words = [
        "a: b",
        *(
            f"{key}={text}"
            for key in ("warmup_steps", "num_cycles", "args", "target", "nonsense")
            for text in hostile.TEXTS
        ),
    ]
    words += [f"{text}" for text in hostile.TEXTS]
    verbs = [["schedules", verb] for verb in ("plot", "explain")]
    judge(((w[:30], [*verbs[n % 2], "--", "cosine", w]) for n, w in enumerate(words)), 15, every=11)
    judge(((w[:30], ["schedules", "show", "--", w]) for n, w in enumerate(hostile.TEXTS)), 5, every=5)


def test_bases(world: World, judge: Callable[..., None]) -> None:
    check = ["check", "-c", str(world.config)]
    files = [
        "model_index.json",
        "unet/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    for name in files:
        file = world.base / name
        content = json.loads(file.read_bytes())
        judge(spoilt(file, hostile.json_files(content), check), 3, every=5)
        judge(taken(file, check), 1, every=5)
        strides = 199 if name.endswith("tokenizer.json") else 61
        judge(spoilt(file, hostile.json_contents(content, 3), check), 1, every=strides)


def test_weights(world: World, judge: Callable[..., None]) -> None:
    check = ["check", "-c", str(world.config)]
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        judge(spoilt(world.base / name, hostile.tensor_files(world.base / name), check), 10, every=4)
        judge(taken(world.base / name, check), 2, every=3)


def test_loras(world: World, judge: Callable[..., None]) -> None:
    file = world.lora
    commands = [
        ["export", str(file), "-o", str(world.folder / "new.safetensors")],
        ["sample", "--lora", str(file), "--prompt", "x", "--steps", "1", "--size", "32", "-o", str(world.folder)],
    ]
    judge(spoilt(file, hostile.tensor_files(file), *commands), 20, every=2)
    judge(taken(file, *commands), 3, every=2)
    from lora_trainer.storage import safetensors_io

    tensors, metadata = safetensors_io.load(file)
    recipe = json.loads(metadata["lora_trainer"])
    contents = (
        (label, b"".join(safetensors_io.encode(tensors, {"lora_trainer": odd.decode()})))
        for label, odd in hostile.json_contents(recipe)
    )
    judge(spoilt(file, contents, commands[0]), 5, every=173)


def test_logs(world: World, judge: Callable[..., None]) -> None:
    log = world.run / "metrics.jsonl"
    lines = log.read_bytes().splitlines()
    commands = [["diagnose", str(world.run)], ["diagnose", str(world.run), "--json"], ["report", str(world.run)]]
    kinds = {json.loads(line).get("event", "update"): n for n, line in enumerate(lines)}

    def contents() -> hostile.Labelled:
        for kind, number in kinds.items():
            for label, row in [*hostile.json_contents(json.loads(lines[number])), *hostile.json_files({"a": 1})]:
                yield f"{kind} {label}", b"\n".join([*lines[:number], row, *lines[number + 1 :], b""])

    judge(spoilt(log, contents(), *commands), 25, every=31)
    whole = hostile.json_files({})
    judge(spoilt(log, whole, *commands), 4, every=4)
    judge(spoilt(log, iter([("1 GB line", b"x" * 2**28)]), *commands), 1)
    judge(taken(log, *commands), 3, every=2)


def test_records(world: World, judge: Callable[..., None]) -> None:
    run, config, out = str(world.run), str(world.config), str(world.folder / "again.safetensors")
    train, export, report = ["train", "-c", config, "--dry-run"], ["export", run, "-o", out], ["report", run]
    readers = {
        "plan.json": [["diagnose", run], report, train, export],
        "exit.json": [report],
        "environment.json": [report],
        "validation.json": [train, report],
    }
    for name, commands in readers.items():
        file = world.run / name
        content = json.loads(file.read_bytes())
        judge(spoilt(file, hostile.json_files(content), *commands), 4, every=4)
        judge(taken(file, *commands), 1, every=5)
        judge(spoilt(file, hostile.json_contents(content), *commands), 1, every=199 if name == "plan.json" else 29)
    manifest = next(world.run.glob("checkpoints/*/manifest.json"))
    for file in (manifest, manifest.with_name("state.json")):
        content = json.loads(file.read_bytes())
        judge(spoilt(file, hostile.json_files(content), export), 3, every=5)
        judge(spoilt(file, hostile.json_contents(content), export), 2, every=61)
        judge(taken(file, export), 1, every=5)
    settings = settings_of(world.run / "config.yaml")
    commands = [["diagnose", run], report, export, ["sample", "--lora", str(world.lora), "--prompt", "x"]]
    judge(spoilt(world.run / "config.yaml", hostile.configurations(settings), *commands), 10, every=331)
    judge(spoilt(world.run / "config.yaml", hostile.yaml_files("name: x\nsample: {}\n"), *commands), 5, every=9)
    judge(taken(world.run / "config.yaml", *commands), 2, every=3)


def test_sweeps(world: World, judge: Callable[..., None]) -> None:
    again = ["sweep", "-c", str(world.swept)]
    commands = [
        ["report", str(world.sweep)],
        [*again, "--dry-run"],
        [*again, "--status"],
        [*again, "--confirm", "--dry-run"],
    ]
    file = world.sweep / "sweep.json"
    content = json.loads(file.read_bytes())
    judge(spoilt(file, hostile.json_files(content), *commands), 4, every=4)
    judge(taken(file, *commands), 3, every=2)
    judge(spoilt(file, hostile.json_contents(content), *commands), 15, every=79)
    trial = next(world.sweep.glob("trials/*/plan.json"))
    judge(spoilt(trial, hostile.json_files(json.loads(trial.read_bytes())), *commands), 4, every=4)
