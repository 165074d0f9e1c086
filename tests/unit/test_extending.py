"""Every extension point, setting and verb has its place in the docs, and the recipes of the docs are followed."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from house import House

from lora_trainer.cli.program import app
from lora_trainer.config.optimizers import OptimizerOptions, OptimizerRow
from lora_trainer.config.structure import all_keys
from lora_trainer.models.family import Family

ROOT = Path(__file__).parents[2]
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
CONFIG = (ROOT / "docs" / "config.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PLUGIN = ROOT / "tests" / "example_plugin"


def entry_point_groups() -> set[str]:
    """The groups that the package looks up: constants of its modules called ENTRY_POINTS."""
    assigned = (node for tree in House(ROOT).modules.values() for node in tree.body if isinstance(node, ast.Assign))
    return {ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "ENTRY_POINTS"}


def test_every_extension_point_has_its_stub_example_and_contract() -> None:
    groups = entry_point_groups()
    assert groups == {"lora_trainer.lr_schedules", "lora_trainer.optimizers", "lora_trainer.families"}
    lookups = sum(source.count("entry_points(group=") for source in House(ROOT).sources.values())
    assert lookups == sum(source.count("entry_points(group=ENTRY_POINTS") for source in House(ROOT).sources.values())
    for group in groups - {"lora_trainer.families"}:
        (contract,) = re.findall(rf"\| `{group}` \|.*\| `lora_trainer\.testing\.(\w+)` \|", EXTENDING)
        assert f"({contract})" in EXTENDING
        assert f'entry-points."{group}"' in EXTENDING
    for kind in (OptimizerRow, OptimizerOptions):
        (stub,) = re.findall(rf"(?ms)^class {kind.__name__}\b.*?(?=^class|^```)", EXTENDING)
        names = [f.name for f in fields(kind)] if kind is OptimizerRow else [*OptimizerOptions.model_fields]
        assert re.findall(r"(?m)^    (\w+): ", stub) == names
    (stub,) = re.findall(r"(?ms)^class Family\b.*?^```", EXTENDING)
    members = re.findall(r"(?m)^    (?:def )?(\w+)(?:: |\()", stub)
    assert members == re.findall(r"(?m)^    (?:def )?(\w+)(?:: |\()", inspect.getsource(Family))


def test_the_example_of_the_page_is_the_package_of_the_tests() -> None:
    told = dict(re.findall(r"(?ms)^```\w+\n# ([\w/.]+)\n(.*?)^```", EXTENDING))
    files = [file for file in PLUGIN.rglob("*") if file.suffix in (".py", ".toml") and file.name != "__init__.py"]
    assert told == {str(file.relative_to(PLUGIN)): file.read_text() for file in files}


def sections(page: str) -> dict[str, str]:
    """The text under each heading of docs/config.md, by the section it tells of; one that says `As [x]` has x's."""
    found: dict[str, str] = {}
    for title, text in re.findall(r"(?ms)^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", page):
        found[title.partition(".type: ")[0]] = found.get(title.partition(".type: ")[0], "") + text
    for title, text in found.items():
        if same := re.match(r"\s*As \[([\w.]+)\]", text):
            found[title] = found[same[1]]
    return found


def test_every_setting_stands_in_the_docs() -> None:
    told = sections(CONFIG)
    missing = []
    for key in all_keys():
        section, _, name = key.rpartition(".")
        rows = told.get(section or "Top level", "")
        if f"| `{name}` |" not in rows and key not in told and not (name == "type" and rows):
            missing.append(key)
    assert missing == []


def verbs() -> Iterator[str]:
    """Every command of the program."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", {})
        yield from (f"{name} {verb}" for verb in below) if below else [name]


def test_every_verb_stands_in_the_docs() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    assert len(list(verbs())) > 10
    assert [verb for verb in verbs() if not re.search(rf"lora-trainer {verb}\b", text)] == []


def recipe_files(what: str) -> list[str]:
    """The files that docs/architecture.md names for adding something."""
    (row,) = re.findall(rf"(?m)^\| {what} \|([^|]*)\|", ARCHITECTURE)
    return re.findall(r"`([\w/]+\.py)`", row)


def edited(tree: Path, file: str, *edits: tuple[str, str]) -> None:
    """Put text behind what a pattern finds in a file of the package."""
    path = tree / "lora_trainer" / file
    text = path.read_text()
    for pattern, added in edits:
        found = re.search(pattern, text, flags=re.DOTALL)
        assert found, (file, pattern)
        text = text[: found.end()] + added + text[found.end() :]
    path.write_text(text)


SQRT = '''

class Sqrt(FlooredDecayOptions):
    """m = 1 - sqrt(p): fast at first."""

    type: Literal["sqrt"] = "sqrt"
    summary: ClassVar[str] = "a root"
    limits: ClassVar[str] = "falls early"

    def core(self, horizon: Horizon, warmup: int) -> Core:
        return self.floored(lambda p: 1 - math.sqrt(p), horizon, warmup)
'''
NADAM = '''

class NAdam(OptimizerOptions):
    """Adam with Nesterov momentum (Dozat 2016)."""

    type: Literal["nadam"] = "nadam"
    momentum_decay: NotNegative = 4e-3
    """Decay of the momentum."""
'''
SETTING = '''    patience_px: Count = 3
    """Of no effect but on the plan."""
'''
RUN = """
import sys
from lora_trainer.cli.program import main

sys.path.append({docs!r})
from config_page import describe

for words in {commands!r}:
    try:
        main(words)
    except SystemExit as end:
        print("code", end.code or 0)
page = describe()
expected = ("lr_scheduler.type: sqrt", "optimizer.type: nadam", "Of no effect but on the plan. *May change.*")
print([told in page for told in expected])
print("torch" in sys.modules)
"""


@pytest.mark.process
def test_the_recipes_add_a_schedule_an_optimizer_and_a_setting(
    tmp_path: Path, toy_config: Path, program: Callable[..., Any]
) -> None:
    """Followed in a copy of the package, by no more files than the docs name."""
    shutil.copytree(ROOT / "lora_trainer", tmp_path / "lora_trainer", ignore=shutil.ignore_patterns("__pycache__"))
    curves, registry = recipe_files("a schedule")
    edited(tmp_path, curves, (r"class Rex\(.*?horizon, warmup\)\n", SQRT))
    edited(tmp_path, registry, (r"curves\.Rex,\n", "        curves.Sqrt,\n"))
    (optimizers,) = recipe_files("an optimizer")
    row = '    OptimizerRow(NAdam, "torch.optim:NAdam", (1e-5, 1e-2), element_wise=True),\n'
    edited(tmp_path, optimizers, (r"Added to the denominator\.\"\"\"\n", NADAM), (r"\nROWS = \(\n", row))
    schema, user = recipe_files("a setting")
    heeded = '    yield "patience", f"{prepared.config.train.patience_px} px"\n'
    level = "        train.patience_px\n"
    edited(
        tmp_path,
        schema,
        (r"class TrainConfig\(StrictModel\):\n    \"\"\".*?\"\"\"\n", SETTING),
        (r'\n    "free": """\n', level),
    )
    edited(tmp_path, user, (r"def explanation\(.*?\"\"\".*?\"\"\"\n", heeded))

    chosen = ["lr_scheduler={type: sqrt, warmup_steps: 2}", "optimizer={type: nadam, lr: 0.1}", "train.patience_px=7"]
    commands = [
        ["check", "-c", str(toy_config), "--config-only", *chosen],
        ["plan", "-c", str(toy_config), *chosen],
        ["check", "-c", str(toy_config), "--config-only", "train.patience_p=7"],
        ["schedules", "explain", "sqrt"],
    ]
    (tmp_path / "run.py").write_text(RUN.format(commands=commands, docs=str(ROOT / "docs")))
    done = program([sys.executable, str(tmp_path / "run.py")], PYTHONPATH="", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"code (\d)", done.stdout) == ["0", "0", "2", "0"], done.stdout + done.stderr
    assert "sqrt: start 0.000e+00, peak 1.000e-01" in done.stdout
    assert "0.1 is above the usual range of nadam" in done.stdout
    assert "7 px" in done.stdout
    assert "did you mean `patience_px`" in done.stderr
    assert done.stdout.endswith("[True, True, True]\nFalse\n")
