"""What commands refuse, and what their messages say to do: from `cli` down to `storage`, but for what is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from faults import spoil_gradients
from fixes import Row, World, said, typed, written

from fix_rows.configuration import added, swept
from lora_trainer.cli import session
from lora_trainer.cli.program import main
from lora_trainer.config.load import load_config
from lora_trainer.errors import Problem, TrainerError
from lora_trainer.experiments.lr_finder.prepare import FinderOptions, prepare_finder
from lora_trainer.runtime.launch import read_launch

SWEPT = swept("{grid: {optimizer.lr: [1e-3, 1e-4]}}")
MORE = {"swept": SWEPT, "other": ["seed=7"], "dora": ["adapter.use_dora=true"]}
DRY_SWEEP = ("sweep", "--dry-run")


def words(*command: str | Path) -> Callable[[World], None]:
    """The whole command line."""

    def act(world: World) -> None:
        world.command, world.words = [str(word) for word in command], []

    return act


def on_run(*command: str, named: str = "run") -> Callable[[World], None]:
    """A command about a finished run, which stands for `RUN` in its words."""

    def act(world: World) -> None:
        run = world.trained(named, *MORE.get(named, []))
        words(*(word.replace("RUN", str(run)) for word in command))(world)

    return act


def again(old: str, new: str) -> Callable[[World], None]:
    """The same command with other words for one, or for the end of one."""

    def act(world: World) -> None:
        assert any(word.endswith(old) for word in world.command), world.command
        world.command = [
            part
            for word in world.command
            for part in ((word.removesuffix(old) + new).split("|") if word.endswith(old) else [word])
        ]

    return act


def written_words(problem: Problem) -> list[str]:
    return str(problem.fix).removeprefix("write ").split()


EXPORT = [
    Row(
        words("export", ".", "-o", "x.safetensors"),
        said("a run directory", on_run("export", "RUN", "-o", "x.safetensors")),
    ),
    Row(
        on_run("export", "RUN", "-o", "x.safetensors", named="swept"),
        said(
            "trials/<trial>/<trial>.safetensors",
            lambda world: words(
                "export", *Path("runs/swept/trials").glob("*1e-3*/*3-seed42.safetensors"), "-o", "x.safetensors"
            )(world),
        ),
    ),
]
SAMPLE = ("sample", "--lora", "RUN/run.safetensors", "-p", "a", "--steps", "1")
EXPORT += [
    Row(
        lambda world: (
            on_run("export", "RUN", "-o", "x.safetensors", named="swept")(world),
            again("swept", "swept/trials/lr1e-3-seed42")(world),
        ),
        lambda world, problem: words("export", str(problem.fix).split()[-1], "-o", "x.safetensors")(world),
    ),
]
PLANS = [
    Row(
        lambda world: (
            on_run("export", "RUN", "-o", "x.safetensors")(world),
            Path("runs/run/plan.json").write_text("{"),
        ),
        said("restore it", lambda world: shutil.copy(world.kept / "run/plan.json", "runs/run")),
    ),
    Row(
        lambda world: (
            words("export", world.trained("halted", stopped=True), "-o", "x.safetensors")(world),
            Path("runs/halted/plan.json").write_text("{"),
        ),
        said("writes it anew", lambda world: world.program("train", "-c", str(world.config), "name=halted")),
    ),
]
DRAW = [
    Row(words(*SAMPLE), said("runs/demo/demo.safetensors", on_run(*SAMPLE))),
    Row(on_run(*SAMPLE, "--size", "70"), said("write 64", again("70", "64"))),
    Row(
        lambda world: (
            on_run(*SAMPLE)(world),
            Path("runs/run/run.safetensors").rename("x.safetensors"),
            again(str(world.command[2]), "x.safetensors")(world),
        ),
        said(
            "add --model path/to/diffusers-folder",
            lambda world: again("x.safetensors", f"x.safetensors|--model|{world.base}")(world),
        ),
    ),
    Row(
        on_run(*(word.replace("run.", "dora.") for word in SAMPLE), named="dora"),
        said("diffusers/pytorch_lora_weights", again("dora.safetensors", "diffusers/pytorch_lora_weights.safetensors")),
    ),
]
SCHEDULES = [
    Row(words("schedules", "explain", "cosine", "linear"), typed()),
    Row(words("schedules", "plot", "cosine", "-o", "x.jpg"), said(".png", again("x.jpg", "x.png"))),
    Row(words("schedules", "explain", "cosine", "warmup_steps=2000"), typed()),
    Row(
        lambda world: (Path("x.png").mkdir(), words("schedules", "plot", "cosine", "-o", "x.png")(world)),
        said("another place", again("x.png", "y.png")),
    ),
    Row(words("schedules", "show", "cosin"), said("cosine", again("cosin", "cosine"))),
    Row(words("schedules", "show", "nothing"), typed("(lora-trainer schedules list)")),
]
TRAIN = [
    Row(
        "optimizer.lr=1e-3",
        said(
            "add one, as in",
            lambda world: world.words.extend(
                [f"sweep={found}" for key, found in [("", "{grid: {optimizer.lr: [1e-4, 3e-4]}}")]]
                + ["validation={fraction: 0.34}"]
            ),
        ),
        command=DRY_SWEEP,
    ),
    Row(
        SWEPT,
        said("without --status", lambda world: setattr(world, "command", DRY_SWEEP)),
        command=("sweep", "--status"),
    ),
]
FAILING = ["optimizer.lr=1e-2", "train.max_steps=6"]


def diverging(*more: str, trials: Sequence[str | None] = (None,)) -> Callable[[World], None]:
    """The gradients of these trials are not finite."""

    def act(world: World) -> None:
        world.words += [*FAILING, *more]
        for trial in trials:
            spoil_gradients(world.faults, range(9), trial=trial)

    return act


def lower(world: World, problem: Problem) -> None:
    assert "lower optimizer.lr" in str(problem.fix) and "'resume.allow_changes=[optimizer.lr]'" in str(problem.fix)
    world.faults.undo()
    world.words += ["optimizer.lr=1e-3", "resume.allow_changes=[optimizer.lr]"]


TRAIN += [
    Row(diverging(), lower, command=("train",)),
    Row(
        diverging(*swept("{trials: {a: [optimizer.lr=1e-2]}}"), trials=["a-seed42"]),
        said(
            "lower optimizer.lr in the arms",
            lambda world: (world.faults.undo(), added("sweep={trials: {a: [optimizer.lr=1e-3]}}", "name=again")(world)),
        ),
        command=("sweep",),
    ),
]


def finder(world: World) -> None:
    """The finder's plan alone."""
    options = {word.split("=")[0]: float(word.split("=")[1]) for word in world.command[1:]}

    def plan() -> None:
        config = load_config(world.config, world.words)
        prepare_finder(
            config,
            read_launch(config),
            FinderOptions(int(options.get("steps", 100)), options.get("start"), options.get("end"), 2),
            lambda items, *_: items,
        )

    world.call = plan


def found(*options: str, words: Sequence[str] = (SWEPT[0],)) -> Callable[[World], None]:
    def act(world: World) -> None:
        world.command, world.words = ("find-lr", *options), list(words)
        finder(world)

    return act


FINDER = [
    Row(found(words=()), written(0)),
    Row(found(words=()), written(1)),
    Row(
        found(words=[SWEPT[0], "optimizer.type=prodigy"]),
        said("choose another optimizer", added("optimizer.type=adamw")),
    ),
    Row(
        found("steps=5"),
        lambda world, problem: found(f"steps={re.match('([0-9]+) or more', str(problem.fix))[1]}")(world),
    ),
    Row(found("start=1e-2", "end=1e-3"), said("leave them away", found())),
]
SHORT = swept("{grid: {optimizer.lr: [1e-3, 1e-4]}, prune: {short_runs: {length: 50%, keep: 1}}}")


def confirmed(*extra: str, of: str = "swept") -> Callable[[World], None]:
    def act(world: World) -> None:
        world.trained(of, *SWEPT)
        world.words += ["name=swept", *SWEPT, *extra]

    return act


def alone(world: World) -> None:
    """A finished sweep of one arm."""
    confirmed()(world)
    file = Path("runs/swept/sweep.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"trials": content["trials"][:1]}))


CONFIRM = ("sweep", "--confirm", "--dry-run")
DERIVED = [
    Row(
        [*SHORT, "train.max_steps=100", "lr_scheduler={type: constant_with_warmup, warmup_steps: 40}"],
        said('warmup_steps: "5%"', added("lr_scheduler={type: constant_with_warmup, warmup_steps: 25%}")),
        command=DRY_SWEEP,
    ),
    Row(
        [*SHORT, "train={epochs: 3, threads: 1}"],
        said("set train.max_steps", added("train={max_steps: 8, threads: 1}")),
        command=DRY_SWEEP,
    ),
    Row([*SHORT, "train={epochs: 3, threads: 1}"], said("remove short_runs", added(SWEPT[1])), command=DRY_SWEEP),
    Row(
        confirmed("sweep.confirm.seeds=[42, 43]"),
        said("other seeds", added("sweep.confirm.seeds=[43, 44]")),
        command=CONFIRM,
    ),
    Row(
        ["name=swept", *SWEPT],
        said("without --confirm to its end", lambda world: world.trained("swept", *SWEPT)),
        command=CONFIRM,
    ),
    Row(
        alone,
        said(
            "add trials to the sweep",
            lambda world: shutil.copy(world.kept / "swept/sweep.json", "runs/swept/sweep.json"),
        ),
        command=CONFIRM,
    ),
]


def stopped_sweep(*then: str) -> Callable[[World], None]:
    """A sweep that was stopped after its first update, and what was changed then."""

    def act(world: World) -> None:
        world.trained("stopped", *SWEPT, stopped=True)
        world.words += ["name=stopped", *SWEPT, *then]

    return act


RECORD = [
    Row(
        lambda world: (confirmed()(world), Path("runs/swept/sweep.json").write_text("{")),
        said("restore it", lambda world: shutil.copy(world.kept / "swept/sweep.json", "runs/swept")),
        command=DRY_SWEEP,
    ),
    Row(
        stopped_sweep("sweep={grid: {optimizer.lr: [1e-3]}}"), said("put them back", added(SWEPT[1])), command=DRY_SWEEP
    ),
    Row(
        lambda world: (stopped_sweep()(world), (world.own_images() / "00.txt").write_text("other")),
        said("another `name`", added("name=other")),
        command=DRY_SWEEP,
    ),
]


def searched(world: World) -> None:
    """A folder of find-lr among those of runs."""
    on_run("report", "RUN", "search", "-o", "x.html")(world)
    Path("search").mkdir()
    Path("search/find_lr.json").write_text("{}")


REPORT = [
    Row(searched, said("leave it out", lambda world: words(*world.command[:2])(world))),
    Row(words("report", "."), said("name folders that", on_run("report", "RUN"))),
    Row(
        lambda world: (
            on_run("report", "RUN", named="swept")(world),
            [file.unlink() for file in Path("runs/swept/trials").glob("*/metrics.jsonl")],
        ),
        said("start it", lambda world: on_run("report", "RUN")(world)),
    ),
    Row(on_run("report", "RUN", "RUN"), said("name one of them", lambda world: words(*world.command[:2])(world))),
    Row(
        on_run("report", "RUN", "--confirm", "RUN"),
        said("with other seeds", lambda world: words(*world.command[:3], world.trained("other", "seed=7"))(world)),
    ),
]
OPTIONS = [
    Row(
        words("check", "-c", "my.yaml", "--rank", "4"),
        lambda world, problem: words("check", "-c", "my.yaml", *written_words(problem))(world),
    ),
    Row(
        words("check", "-c", "my.yaml", "--optimizer.lr=1e-4"),
        lambda world, problem: words("check", "-c", "my.yaml", *written_words(problem))(world),
    ),
    Row(words("check", "my.yaml"), lambda world, problem: words("check", *written_words(problem))(world)),
]


def strictly(*command: str) -> Callable[[World], None]:
    """The program as a shell starts it; what it would report is raised."""

    def call() -> None:
        with suppress(SystemExit):
            main([*command])

    def act(world: World) -> None:
        def report_error(error: TrainerError, **_: bool) -> None:
            raise error

        world.patch.setattr(session, "report_error", report_error)
        world.call = call

    return act


PROGRAM = [Row(strictly("train", "--nonsense"), typed(r"(\S+ \S+ --help)"))]
SHOW = [
    Row(
        lambda world: (Path("runs/run-check").mkdir(parents=True), Path("runs/run-check/mine").write_text("")),
        said("another `name`", added("name=other")),
        command=("check", "--show", "1"),
    )
]
ROWS: Mapping[str, Sequence[Row]] = {
    "cli/export.py": EXPORT,
    "cli/options.py": OPTIONS,
    "cli/plan.py": [Row(words("presets", "nothing"), said("known", again("nothing", "lora")))],
    "cli/program.py": PROGRAM,
    "cli/schedules.py": SCHEDULES,
    "cli/session.py": [
        Row(
            lambda world: (Path("x.html").write_text("mine"), on_run("report", "RUN", "-o", "x.html")(world)),
            said("--output", again("x.html", "y.html")),
        )
    ],
    "cli/show.py": SHOW,
    "cli/train.py": TRAIN,
    "evidence/diagnosis/log.py": [Row(words("diagnose", "."), said("<output_dir>/<name>", on_run("diagnose", "RUN")))],
    "experiments/lr_finder/prepare.py": FINDER,
    "experiments/sweep/derived.py": DERIVED,
    "experiments/sweep/record.py": RECORD,
    "report/runs.py": REPORT,
}
