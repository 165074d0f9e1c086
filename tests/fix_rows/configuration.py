"""What is wrong with a configuration, and what its message says to write: the rooms `config` and `schedules`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

from fixes import Row, World, complained_of, removed, said, valued, written

from lora_trainer.errors import Problem
from lora_trainer.schedules import registry

DEMO = "configs/demo.yaml"
SWEEP, DRY = "validation={fraction: 0.34}", ("sweep", "--dry-run")


def text(new: str, old: str = "name: run") -> Callable[[World], object]:
    """The configuration file, changed."""
    return lambda world: world.config.write_text(world.config.read_text().replace(old, new))


def swept(section: str) -> list[str]:
    return [SWEEP, f"sweep={section}"]


def renamed(old: str, new: str) -> Callable[[World], object]:
    """An override under another key."""

    def act(world: World) -> None:
        world.words[:] = [word.replace(old, new, 1) for word in world.words]

    return act


def added(*words: str) -> Callable[[World], object]:
    return lambda world: world.words.extend(words)


def without_length(world: World) -> None:
    text("", "max_steps: 2, ")(world)


def prodigy(world: World) -> None:
    world.words += ["optimizer={type: prodigy, lr: 1.0, groups: [{name: own, match: [attn1], lr: 0.5}]}"]


def schedule_free(world: World) -> None:
    world.words += [
        "optimizer={type: schedule_free_adamw, groups: [{name: own, match: [attn1], lr_scheduler: {type: linear}}]}",
        "lr_scheduler={type: cosine}",
    ]


def called(world: World, problem: Problem) -> None:
    """The setting, or the type, under the name that the fix has for it."""
    ours = re.findall(r"`([\w.\[\]]+)`", str(problem.fix))
    kept = [word for word in world.words if not word.startswith(f"{complained_of(problem)}=")]
    (wrong,) = (word for word in world.words if word not in kept)
    key, _, value = wrong.partition("=")
    if key.endswith(".type"):
        world.words[:] = [*kept, f"{key}={ours[0]}"]
    else:
        known = ours[0] if "." in ours[0] else f"{key.rpartition('.')[0]}.{ours[0]}"
        kind = re.search(r"of type (\w+)", str(problem.fix))
        world.words[:] = [*kept, *([f"lr_scheduler.type={kind[1]}"] if kind else []), f"{known}={value}"]


CONFLICTS = [
    Row(without_length, written(0)),
    Row(without_length, written(1)),
    Row("train.epochs=10", written(0)),
    Row("train.epochs=10", written(1)),
    Row("data.dir=null", written(0)),
    Row("data.dir=null", written(1)),
    Row("data.sources=[{dir: images}]", removed("data.sources")),
    Row("data.sources=[{dir: images}]", written()),
    Row("validation={every_steps: 5}", written(0)),
    Row("validation={every_steps: 5}", written(1)),
    Row("validation={fraction: 0.2, dir: there}", written(0)),
    Row("data.crops_per_image=4", removed()),
    Row("data.crops_per_image=4", written()),
    Row("optimizer={type: sgd, lr: 0.1, momentum: 0, nesterov: true}", written()),
    Row(["optimizer.type=sgd", "optimizer.lr=0.1", "optimizer.momentum=0", "optimizer.nesterov=true"], removed()),
    Row(["adapter.use_dora=true", "adapter.use_rslora=true"], written(0)),
    Row(["adapter.use_dora=true", "adapter.use_rslora=true"], written(1)),
    Row("resume.schedule=stretch", written()),
    Row("resume.schedule=stretch", removed()),
    Row("sample.every_steps=5", written()),
    Row("sample.every_steps=5", removed()),
    Row("model={path: there, revision: abc}", valued(r"id such as (\S+)", "model.path")),
    Row(["model.path=there", "model.revision=abc"], removed()),
    Row(["optimizer.type=schedule_free_adamw", "lr_scheduler={type: cosine}"], written()),
    Row(
        schedule_free,
        said(
            "of the groups, too", added("optimizer.groups=[{name: own, match: [attn1]}]", "lr_scheduler.type=constant")
        ),
    ),
    Row(["optimizer.type=schedule_free_adamw", "train.ema_decay=0.9"], removed("train.ema_decay")),
    Row(prodigy, said("remove the groups' lr", added("optimizer.groups=[]"))),
    Row(
        prodigy,
        said(
            "choose another optimizer",
            added("optimizer={type: adamw, lr: 1e-3, groups: [{name: own, match: [attn1], lr: 0.5}]}"),
        ),
    ),
    Row("lr_scheduler={type: plateau}", written()),
    Row("sweep={grid: {optimizer.lr: [1e-4]}}", written()),
]


def of_a_plugin(world: World) -> None:
    """The configuration of a run that was trained with a package which is gone."""
    text("name: run\nlr_scheduler: sawtooth")(world)
    (world.folder / "plan.json").write_text("{}")


def installed(world: World) -> None:
    """The package is there."""
    entry = EntryPoint("sawtooth", "sawtooth:sawtooth", registry.ENTRY_POINTS)
    world.faults.setattr(registry, "entry_points", lambda **_: [entry])


LOAD = [
    Row(of_a_plugin, said("install the package", installed)),
    Row("lr_scheduler.type=step", said("add lr_scheduler.step_size", added("lr_scheduler.step_size=10"))),
    Row("lr_scheduler={warmup_steps: 1}", valued(r"add `type` to it.*, (linear)", "lr_scheduler.type")),
    Row(
        "lr_scheduler={type: phases, phases: [{warmup_steps: 1, steps: 1}]}",
        said("linear", added("lr_scheduler={type: phases, phases: [{type: linear, warmup_steps: 1, steps: 2}]}")),
    ),
    Row(["lr_scheduler.type=cosine", "lr_scheduler.gamma=0.9"], removed()),
    Row(
        ["lr_scheduler.type=cosine", "lr_scheduler.gamma=0.9"],
        valued(r"has it: (exponential),", "lr_scheduler.type"),
    ),
    Row(
        ["optimizer.groups=[{name: own, match: [attn1], lr_scheduler: {type: linear, gamma: 0.9}}]"],
        said(
            "exponential",
            added("optimizer.groups=[{name: own, match: [attn1], lr_scheduler: {type: exponential, gamma: 0.9}}]"),
        ),
    ),
    Row("train.max_train_steps=3", called),
    Row(["lr_scheduler.type=linear", "lr_scheduler.T_max=2"], called),
    Row("train.noise_offset=0.1", removed()),
    Row("train.batchsize=2", called),
    Row("train.lr=1e-3", called),
    Row(["lr_scheduler.type=linear", "train.warmup_shape=cosine"], called),
    Row("train.nonsense=1", removed()),
    Row(text("name: 001"), said("in quotes", text('name: "001"', "name: 001"))),
    Row("optimizer.type=AdamW", called),
    Row("optimizer.type=nothing", said("known: adamw", added("optimizer.type=adamw"))),
    Row("lr_scheduler.type=nothing", said("known:", added("lr_scheduler.type=cosine"))),
    Row("lr_scheduler.type=StepLR", said("", added("lr_scheduler={type: step, step_size: 1}"))),
    Row(
        "lr_scheduler.type=LinearLR",
        said("write type: torch and target: LinearLR", added("lr_scheduler={type: torch, target: LinearLR}")),
    ),
]


def not_utf8(world: World) -> None:
    world.config.write_bytes(world.config.read_bytes() + "# für\n".encode("latin-1"))


def as_utf8(world: World) -> None:
    world.config.write_text(world.config.read_bytes().decode("latin-1"), encoding="utf-8")


SOURCE = [
    Row("optimizer.lr", said("optimizer.lr=3e-4", renamed("optimizer.lr", "optimizer.lr=3e-4"))),
    Row(not_utf8, said("save it as UTF-8", as_utf8)),
    Row(
        lambda world: world.config.rename("other.yaml"),
        said("name one that is there", lambda world: Path("other.yaml").rename(world.config)),
    ),
    Row(
        lambda world: (Path("whole.yaml").write_text(world.config.read_text()), world.config.write_text("- list")),
        said("name: my-run", lambda world: world.config.write_text(Path("whole.yaml").read_text())),
    ),
    Row(text("name: run\nname: too"), said("remove one of the two lines", text("", "name: too"))),
    Row(text("name: &n run\nseed: *n"), said("write it out", text("name: run\nseed: 1", "name: &n run\nseed: *n"))),
    Row(text("<<: {name: run}"), said("write its keys out", text("name: run", "<<: {name: run}"))),
    Row(text("name: !text run"), said("remove it", text("name: run", "name: !text run"))),
]
TRIALS = [
    Row(
        swept("{trials: {a: [seed=1], b: [optimizer.lr=1e-3]}}"),
        said("remove it", added("sweep={trials: {b: [optimizer.lr=1e-3]}}")),
    ),
    Row(
        swept("{trials: {lr1e-3: [train.max_grad_norm=2]}, grid: {optimizer.lr: [1e-3]}}"),
        said("rename", added("sweep={trials: {other: [train.max_grad_norm=2]}, grid: {optimizer.lr: [1e-3]}}")),
    ),
    Row(
        swept("{trials: {a/b: [optimizer.lr=1e-3]}}"),
        said("rename", added("sweep={trials: {a-b: [optimizer.lr=1e-3]}}")),
    ),
    Row(
        swept("{random: {num: 2, optimizer.lr: {log_uniform: [1e-3, 1e-5]}}}"),
        said(
            "", lambda world: world.words.append("sweep={random: {num: 2, optimizer.lr: {log_uniform: [1e-5, 1e-3]}}}")
        ),
    ),
    Row(
        swept("{random: {num: 3, optimizer.lr: {choice: [1e-3, 1e-4]}}}"),
        said("write num: 2", added("sweep.random.num=2")),
    ),
    Row(
        swept("{trials: {a: [optimizer.lr=1e-3], b: [optimizer.lr=0.001]}}"),
        said("remove one of them", added("sweep={trials: {a: [optimizer.lr=1e-3]}}")),
    ),
]
TRIALS = [replace(row, command=("sweep", "--dry-run")) for row in TRIALS]

PLAN, SCHEDULE = ("plan",), "lr_scheduler={type: %s}"
ADVICE = [
    Row(
        SCHEDULE % "cosine, warmup_steps: 2",
        said('as in warmup_steps: "5%"', added("lr_scheduler.warmup_steps=5%", "train.max_steps=20")),
        PLAN,
    ),
    Row(
        SCHEDULE % "polynomial, lr_end: 1e-2",
        said("write `min_ratio`", added(SCHEDULE % "polynomial, min_ratio: 0.1")),
        PLAN,
    ),
    Row(SCHEDULE % "polynomial, lr_end: 1e-2", said("lower `lr_end`", added("lr_scheduler.lr_end=1e-6")), PLAN),
    Row(
        SCHEDULE % "cosine_annealing, t_max: 2, eta_min: 1e-2",
        said("lower `eta_min`", added("lr_scheduler.eta_min=1e-6")),
        PLAN,
    ),
    Row("export.every_steps=0", said("write null for never", added("export.every_steps=null"))),
    Row("data.captions.extension=txt", valued(r"as (\.txt)", "data.captions.extension")),
    Row(
        "lr_scheduler={type: cosine, warmup_steps: 0.05}",
        said('of the run is "5%"', added("lr_scheduler.warmup_steps=5%")),
    ),
    Row(
        swept("{trials: {a: [seed=1]}}"),
        said("write sweep.seeds", added("sweep={seeds: [1], trials: {a: [train.max_grad_norm=2]}}")),
        DRY,
    ),
    Row(
        SCHEDULE % "torch, target: ReduceLROnPlateau",
        said("use type: plateau", added("lr_scheduler={type: plateau}", "validation={fraction: 0.34}")),
        PLAN,
    ),
    Row(
        lambda world: (
            Path("own.py").write_text("def saw(num_updates, updates_per_epoch):\n    return lambda k: 0.5\n"),
            added('lr_scheduler={type: "own:saw"}')(world),
        ),
        said(
            "--allow-plugins",
            lambda world: (
                world.faults.setattr(sys, "path", [*sys.path]),
                world.faults.setattr(registry, "_allowed", False),
                setattr(world, "command", ("plan", "--allow-plugins")),
            ),
        ),
        PLAN,
    ),
]
ROWS: Mapping[str, Sequence[Row]] = {
    "config/conflicts.py": CONFLICTS,
    "config/load.py": LOAD,
    "config/source.py": SOURCE,
    "config/trials.py": TRIALS,
}
