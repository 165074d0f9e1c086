"""What images, captions, bases, LoRA files and plans are refused for: `data`, `models`, `lora_files`, `planning`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixes import Row, World, removed, said, valued, written
from safetensors.numpy import load_file, save_file

from fix_rows.commands import DRAW, PLANS, SAMPLE, again, on_run
from fix_rows.configuration import added
from lora_trainer.errors import Problem
from lora_trainer.models.stable_diffusion import StableDiffusion

CHECK = ("check",)


def pictures(name: str, content: bytes | None) -> Callable[[World], None]:
    """A file among the images has other content, or is gone."""

    def act(world: World) -> None:
        file = world.own_images() / name
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)

    return act


def healed(name: str) -> Callable[[World], None]:
    """The file among the images as it was."""
    return lambda world: shutil.copy(world.images / name, world.folder / "images" / name)


def converted(world: World, problem: Problem) -> None:
    """What a shell does with the command line that the fix prints."""
    words = shlex.split(str(problem.fix).partition(": ")[2])
    iconv, source, encoding, target, out, old, redirect, new, then, move, moved, place = words
    assert (iconv, source, target, out, redirect, then, move) == ("iconv", "-f", "-t", "UTF-8", ">", "&&", "mv")
    Path(new).write_text(Path(old).read_bytes().decode(encoding), encoding="utf-8")
    Path(moved).rename(place)


def moved(old: str, new: str) -> Callable[[World], None]:
    return lambda world: (world.own_images() / old).rename(world.own_images() / new)  # type: ignore[func-returns-value]


def numbered(world: World) -> None:
    """Images in a folder that asks for no repeats."""
    images = world.own_images()
    (images / "0_cat").mkdir()
    for file in images.glob("0*.*"):
        file.rename(images / "0_cat" / file.name)


def shut(world: World) -> None:
    (world.own_images() / "more").mkdir()
    honest = os.scandir

    def scandir(folder: Any) -> Any:
        if str(folder).endswith("more"):
            raise PermissionError(13, "Permission denied", str(folder))
        return honest(folder)

    world.faults.setattr(os, "scandir", scandir)


def opened(world: World) -> None:
    world.faults.undo()


def unreadable(world: World, name: str = "00.txt") -> None:
    world.own_images()

    def refused(honest: Callable[..., Any]) -> Callable[..., Any]:
        def act(self: Path, *options: Any, **named: Any) -> Any:
            if self.name == name:
                raise PermissionError(13, "Permission denied", str(self))
            return honest(self, *options, **named)

        return act

    for method in ("read_bytes", "open"):
        world.faults.setattr(Path, method, refused(getattr(Path, method)))


def many(world: World) -> None:
    for number in range(6):
        pictures(f"more{number}.png", b"broken")(world)


def listed(world: World, problem: Problem) -> None:
    """The command that the fix prints lists every file."""
    assert "`lora-trainer check --json`" in str(problem.fix)
    world.command = ("check", "--json")
    (left,) = world.problems()
    assert "6 files are refused" in left.what, left
    for number in range(6):
        (world.own_images() / f"more{number}.png").unlink()


def no_file(name: str) -> Callable[[World], None]:
    """Something else than a file lies there, of which a read would never end."""

    def act(world: World) -> None:
        pictures(name, None)(world)
        os.mkfifo(world.own_images() / name)

    return act


def repeated(world: World) -> None:
    """The images lie in `5_cat`, which is given as the folder itself."""
    shutil.copytree(world.images, "around/5_cat")
    world.words += ["data.dir=around/5_cat", "data.layout=kohya"]


def kohya(world: World) -> None:
    world.own_images()
    world.words.append("data.layout=kohya")


def into_folder(world: World) -> None:
    images = world.own_images()
    (images / "2_cat").mkdir()
    for file in [*images.glob("*.*")]:
        file.rename(images / "2_cat" / file.name)


def changing(world: World) -> None:
    """An image is another one once all are checked."""
    world.own_images()
    honest = StableDiffusion.load_vae

    def load_vae(self: StableDiffusion, device: torch.device) -> Any:
        pictures("00.png", (world.images / "01.png").read_bytes())(world)
        return honest(self, device)

    world.faults.setattr(StableDiffusion, "load_vae", load_vae)


LONG = b"a caption of far too many letters for this encoder"
RECORDS = [
    Row(pictures("x.png", b"broken"), said("take it out", pictures("x.png", None))),
    Row(pictures("00.png", b"broken"), said("replace the file", healed("00.png"))),
    Row("data.dir=gone", said("set data.dir", lambda world: world.words.append(f"data.dir={world.images}"))),
    Row(
        lambda world: (Path("empty").mkdir(), added("data.dir=empty")(world)),
        said("point data.dir at", lambda world: world.words.append(f"data.dir={world.images}")),
    ),
    Row(numbered, said("rename it to 1_", moved("0_cat", "1_cat"))),
    Row(lambda world: unreadable(world, "00.png"), said("check its permissions", opened)),
    Row(
        lambda world: (
            world.words.append("data.on_bad_image=skip"),
            [pictures(f"{name}.png", b"broken")(world) for name in "xy"],
        ),
        said("take them out", lambda world: [pictures(f"{name}.png", None)(world) for name in "xy"]),
    ),
    Row(
        lambda world: (
            world.words.append("data.on_bad_image=skip"),
            [pictures(f"{name}.png", b"broken")(world) for name in ("00", "01")],
        ),
        said("replace them", lambda world: [healed(f"{name}.png")(world) for name in ("00", "01")]),
    ),
]
CAPTIONS = [
    Row(no_file("00.txt"), said("text file", lambda world: (pictures("00.txt", None)(world), healed("00.txt")(world)))),
    Row(pictures("00.txt", None), said("write it", healed("00.txt"))),
    Row(
        pictures("00.txt", None),
        said("missing to filename", added("data.captions.missing=filename", "data.captions.too_long=cut")),
    ),
    Row(pictures("00.txt", None), said("or empty", added("data.captions.missing=empty"))),
    Row(unreadable, said("may read", opened)),
    Row(pictures("00.txt", b"x" * 2_000_000), said("text file", healed("00.txt"))),
    Row(pictures("00.txt", "a cat".encode("utf-16")), converted),
    Row(pictures("00.txt", "a b\xe4r".encode("latin-1")), converted),
    Row(pictures("00.txt", b"a\0b"), said("plain UTF-8", healed("00.txt"))),
    Row(pictures("00.txt", LONG), said("shorten it", healed("00.txt"))),
    Row(pictures("00.txt", LONG), written()),
]
ADVICE = [
    Row(
        lambda world: (
            moved("00.txt", "00.caption")(world) and [moved(f"0{n}.txt", f"0{n}.caption")(world) for n in range(1, 6)]
        ),
        valued(r"set data.captions.extension: (\S+)", "data.captions.extension"),
        CHECK,
    ),
    Row(
        lambda world: (
            world.trained("run"),
            world.words.extend(["optimizer.lr=1e-3", "resume.allow_changes=[optimizer.lrr]"]),
        ),
        valued(r"did you mean `(\S+)`", "resume.allow_changes"),
        ("train",),
    ),
]
ENTRIES = [Row(changing, said("start again", opened), command=("train",))]
FOLDERS = [
    Row(repeated, valued(r"point data.dir at ([^\s,]+)", "data.dir")),
    Row(repeated, written()),
    Row(kohya, said("move it into such a folder", into_folder), about="00.png"),
    Row(kohya, written(), about="00.png"),
    Row(many, listed, about="check --json"),
    Row(shut, said("permissions", opened)),
    Row(shut, said("take it out", lambda world: (opened(world), (world.own_images() / "more").rmdir()))),
    Row(
        lambda world: os.mkfifo(world.own_images() / "x.png"),
        said("take it out", lambda world: (world.own_images() / "x.png").unlink()),
    ),
]


def few(world: World) -> None:
    for file in world.own_images().glob("0[2-9].*"):
        file.unlink()
    world.words.append("validation={fraction: 0.5}")


def held(*names: str) -> Callable[[World], None]:
    """A folder of validation images that are trained on."""

    def act(world: World) -> None:
        Path("held").mkdir(exist_ok=True)
        for name in names:
            for ending in ("png", "txt"):
                shutil.copy(world.own_images() / f"{name}.{ending}", Path("held"))
        world.words.append("validation={dir: held}")

    return act


def apart(world: World) -> None:
    held("00", "01")(world)
    for name in ("00", "01"):
        pictures(f"{name}.png", None)(world)


HOLDOUT = [
    Row(held("00", "01"), said("take it out of one", apart)),
    Row(
        lambda world: (held("00")(world), pictures("00.png", None)(world)),
        said(
            "add images",
            lambda world: (
                [shutil.copy(world.own_images() / f"01.{ending}", Path("held")) for ending in ("png", "txt")],
                pictures("01.png", None)(world),
            ),
        ),
    ),
    Row(few, said("add images", lambda world: shutil.copytree(world.images, world.own_images(), dirs_exist_ok=True))),
    Row(few, removed("validation")),
]


def part(component: str, change: Callable[[Path], object]) -> Callable[[World], None]:
    """A component of the base, changed."""

    def act(world: World) -> None:
        change(world.own_base() / component)

    return act


def setting(component: str, **values: Any) -> Callable[[World], None]:
    """Other values in a component's configuration."""

    def change(file: Path) -> None:
        content = json.loads(file.read_text()) | values
        file.unlink()  # it is a link to the base's own
        file.write_text(json.dumps(content))

    name = (
        "scheduler_config.json"
        if component == "scheduler"
        else "tokenizer_config.json"
        if component == "tokenizer"
        else "config.json"
    )
    return part(f"{component}/{name}", change)


def rewritten(content: bytes) -> Callable[[Path], object]:
    return lambda file: (file.unlink(), file.write_bytes(content))


def fetched(world: World) -> None:
    """The whole folder as it should be."""
    shutil.rmtree(world.folder / "base")
    shutil.copytree(world.base, world.folder / "base")


def single(keys: Sequence[str], name: str = "x.safetensors") -> Callable[[World], None]:
    """A single file in place of a base."""

    def act(world: World) -> None:
        if keys:
            save_file({key: np.zeros(1, np.float32) for key in keys}, name)
        else:
            Path(name).write_bytes(b"no tensors")
        world.words.append(f"model.path={name}")

    return act


def whole(world: World) -> None:
    world.words.append(f"model.path={world.base}")


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def sharded(world: World) -> None:
    """The UNet in one shard, whose index names a tensor more."""
    place = world.own_base() / "unet"
    name = "diffusion_pytorch_model-00001-of-00001.safetensors"
    (world.folder / "base" / UNET).rename(place / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys([*load_file(place / name), "other.weight"], name)}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


NOISE = [
    Row(setting("scheduler", _class_name="OtherScheduler"), said("own scheduler folder", fetched)),
]
FOLDER = [
    Row(
        part("tokenizer", lambda folder: os.mkfifo(folder / "x.txt")),
        said("take it out", part("tokenizer", lambda folder: (folder / "x.txt").unlink())),
    ),
    Row(sharded, said("index and shards", fetched)),
    Row(part("unet/config.json", Path.unlink), said("fetch the whole", fetched)),
    Row(part("unet/config.json", rewritten(b"{")), said("fetch the base again", fetched)),
    Row(part("unet/config.json", rewritten(b"[]")), said("fetch the base again", fetched)),
    Row(part(UNET, rewritten(b"x")), said("fetch the file again", fetched)),
    Row(part(UNET, lambda file: file.rename(file.with_suffix(".bin"))), said("safe_serialization=True", fetched)),
    Row(
        part(UNET, lambda f: (f.unlink(), f.with_suffix(".safetensors.index.json").write_text("{}"))),
        said("fetch it again", fetched),
    ),
    Row(single([], "x.ckpt"), said(".safetensors version", whole)),
    Row(single([]), said("fetch it again", whole)),
    Row(single(["lora_unet.x"]), said("set model.path", whole)),
    Row(single(["double_blocks.0.x"]), said("a diffusers folder of", whole)),
    Row(
        lambda world: (Path("none").mkdir(), added("model.path=none")(world)),
        said("set model.path to a diffusers", whole),
    ),
    Row("model.path=./none/at/all", said("set model.path", whole)),
    Row(lambda world: world.words.extend([f"model.path={world.base}", "model.revision=x"]), removed("model.revision")),
]


REGISTRY = [
    Row("model.family=none", valued(r"known: (auto)", "model.family")),
    Row(part("model_index.json", rewritten(b'{"_class_name": "FluxPipeline"}')), said("a base for one of", fetched)),
]
CLIP = [
    Row(setting("text_encoder", vocab_size=7), said("of one base again", fetched)),
    Row(part("tokenizer/tokenizer.json", rewritten(b'{"model": 1}')), said("of one base again", fetched)),
]
SD = [
    Row(setting("unet", in_channels=9), said("the base's own folder", fetched)),
    Row(setting("tokenizer", model_max_length=99), said("own folder", fetched)),
]
TARGETS = [
    Row("adapter.targets=attentio", valued(r"did you mean (\w+)\?", "adapter.targets")),
    Row(
        "adapter.targets=[none]",
        lambda world, problem: world.words.append(
            f"adapter.targets=[{re.search(r'look like: ([^,]+)', str(problem.fix))[1]}]"  # type: ignore[index]
        ),
    ),
    Row(
        "optimizer={type: adamw, lr: 1e-3, groups: [{name: own, match: [none]}]}",
        lambda world, problem: world.words.append(
            "optimizer.groups=[{name: own, match: [" + str(problem.fix).rpartition(" ")[2] + "]}]"
        ),
    ),
]
PROMPT = f"sample.prompts=[{{prompt: '{LONG.decode()}'}}]"
PREFLIGHT = [
    Row("sample.prompts=prompts.txt", said("prompts themselves", added("sample.prompts=['a cat']"))),
    Row(
        lambda world: (Path("link").symlink_to("/none/none"), world.words.append("output_dir=link")),
        said("make what it leads to", lambda _: (Path("link").unlink(), Path("link").mkdir())),
    ),
    Row("sample.prompts=['a cat --ar 3']", said("take it out; data.resolution", added("sample.prompts=['a cat']"))),
    Row(PROMPT, said("shorten it", added("sample.prompts=['a cat']"))),
    Row(PROMPT, written()),
    Row(
        lambda world: (
            setting("scheduler", num_train_timesteps=9)(world),
            added("sample={prompts: ['a cat'], num_inference_steps: 10}")(world),
        ),
        written(),
    ),
    Row(setting("scheduler", rescale_betas_zero_snr=True), written()),
    Row(setting("scheduler", prediction_type="sample"), valued(r"one of (\w+)", "model.prediction_type")),
    Row("data.resolution=70", valued(r"write (\d+)", "data.resolution")),
    Row("data.resolution=70", valued(r"or (\d+)", "data.resolution")),
    Row(
        lambda world: world.words.append(f"output_dir={world.own_images()}"),
        said("another output_dir", added("output_dir=elsewhere")),
    ),
    Row(
        lambda world: (Path("file").write_text(""), world.words.append("output_dir=file")),
        said("another output_dir", added("output_dir=elsewhere")),
    ),
    Row(
        lambda world: (Path("file").write_text(""), world.words.append("data.cache_dir=file")),
        said("another data.cache_dir", added("data.cache_dir=elsewhere")),
    ),
    Row(
        lambda world: (Path("file").write_text(""), world.words.append("output_dir=file")),
        said("mend the folder", lambda _: (Path("file").unlink(), Path("file").mkdir())),
    ),
]
VALUES = "lr_scheduler={type: piecewise_constant, boundaries: [2], values: [1, %s]}"
GROUP = "optimizer.groups=[{name: %s, match: ['*to_q'], lr: 1e-4}]"
RUN_PLAN = [
    Row(GROUP % "unet", said("another name", added(GROUP % "queries"))),
    *PLANS,
    Row(
        ["optimizer.lr=0.5", "train.max_steps=20", VALUES % "1e308"],
        said("write usual numbers", added(VALUES % "1e-1")),
    ),
    Row("train={epochs: 1000000}", said("write fewer", added("train.epochs=3"))),
]


def spoilt(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[World], None]:
    """A LoRA file with other tensors."""

    def act(world: World) -> None:
        on_run("sample", "--lora", "RUN/run.safetensors", "-p", "a", "--steps", "1")(world)
        file = Path("runs/run/run.safetensors")
        shutil.copy(file, "earlier.safetensors")
        save_file(change(load_file(file)), file)

    return act


def first(tensors: dict[str, Any], value: float) -> dict[str, Any]:
    name = next(name for name in tensors if "lora_up" in name)
    return tensors | {name: np.full_like(tensors[name], value)}


def halved(tensors: dict[str, Any]) -> dict[str, Any]:
    gone = next(name for name in tensors if "lora_up" in name)
    return {name: tensor for name, tensor in tensors.items() if name != gone}


LORA = [
    Row(
        spoilt(halved),
        said("as it was written", lambda world: shutil.copy("earlier.safetensors", "runs/run/run.safetensors")),
    ),
    Row(
        spoilt(lambda tensors: first(tensors, np.nan)),
        said("an earlier LoRA", lambda world: shutil.copy("earlier.safetensors", "runs/run/run.safetensors")),
    ),
]


def too_many_steps(world: World) -> None:
    on_run(*SAMPLE, "--steps", "3")(world)
    setting("scheduler", num_train_timesteps=2)(world)
    world.words, world.command = [], [*world.command, "--model", str(world.folder / "base")]


TOO_LONG = "x " * 200
STEPS = [
    Row(
        on_run("sample", "--lora", "RUN/run.safetensors", "-p", TOO_LONG, "--steps", "1"),
        said("shorten it", again(TOO_LONG, "x")),
    ),
    Row(
        too_many_steps,
        lambda world, problem: again("3", re.search(r"--steps (\d+) or", str(problem.fix))[1])(world),  # type: ignore[index]
    ),
]
WHOLE = [*PLANS, *DRAW, *STEPS]
"""Rows with commands of their own."""
ROWS: Mapping[str, Sequence[Row]] = {
    file: [
        row if row.command or row in WHOLE or file.startswith("lora_files") else replace(row, command=CHECK)
        for row in rows
    ]
    for file, rows in {
        "cli/sample.py": [*DRAW, *STEPS],
        "data/captions.py": CAPTIONS,
        "data/entries.py": ENTRIES,
        "data/records.py": RECORDS,
        "data/folders.py": FOLDERS,
        "data/holdout.py": HOLDOUT,
        "models/folder.py": FOLDER,
        "models/noise_scheduler.py": NOISE,
        "models/registry.py": REGISTRY,
        "models/clip.py": CLIP,
        "models/stable_diffusion.py": SD,
        "models/adapters/targets.py": TARGETS,
        "planning/preflight.py": PREFLIGHT,
        "planning/run_plan.py": RUN_PLAN,
        "lora_files/files.py": LORA,
    }.items()
}
