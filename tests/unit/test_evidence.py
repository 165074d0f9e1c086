"""The table of claims is complete, and docs/learning_rates.md says what the code does."""

from __future__ import annotations

import ast
import math
import re
import shlex
from functools import reduce
from pathlib import Path

import pytest
from claims import CLAIMS
from conftest import COLLECTED
from ruamel.yaml import YAML

from lora_trainer.cli.plan import show_preset
from lora_trainer.config.learning_rates import PRESETS
from lora_trainer.config.optimizers import OPTIMIZERS, AdamW
from lora_trainer.planning.run_plan import steps_per_epoch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ADVICE = (DOCS / "learning_rates.md").read_text()


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, cell by cell."""
    section = text.split(f"{heading}\n", 1)[1]
    lines = re.search(r"(?m)(^\|.*\n)+", section).group().splitlines()  # type: ignore[union-attr]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_row_is_there_with_a_test_or_an_answer() -> None:
    ids = [*(f"S{n}" for n in range(1, 46)), *(f"X{n}" for n in range(1, 16)), *(f"A{n}" for n in range(1, 7))]
    assert [claim.id for claim in CLAIMS] == ids
    for claim in CLAIMS:
        assert claim.what, claim.id
        assert claim.tests or "](" in claim.answer, claim.id


def test_every_test_that_is_named_exists_and_is_collected(request: pytest.FixtureRequest) -> None:
    named = [test for claim in CLAIMS for test in claim.tests]
    assert len(named) > 60
    whole = not any("::" in word for word in request.config.args)  # of a file asked for, every test is collected
    collected = {node.partition("[")[0].removeprefix("tests/") for node in request.config.stash[COLLECTED]}
    for file in sorted({test.partition("::")[0] for test in named}):
        tests = {test for test in named if test.startswith(f"{file}::")}
        body = ast.parse((ROOT / "tests" / file).read_text()).body
        assert tests <= {f"{file}::{node.name}" for node in body if isinstance(node, ast.FunctionDef)}
        if whole and any(node.startswith(f"{file}::") for node in collected):
            assert tests <= collected


@pytest.mark.parametrize("page", ["learning_rates.md", "schedules.md", "diagnosis.md"])
def test_links_lead_somewhere(page: str) -> None:
    check_links((DOCS / page).read_text())


def test_links_of_the_claims_lead_somewhere() -> None:
    check_links(" ".join(claim.answer for claim in CLAIMS))


def check_links(text: str) -> None:
    """Every link of a text in docs/ has its file and its heading."""
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert (DOCS / file).is_file(), target
        assert not anchor or anchor in anchors(DOCS / file), target


def test_every_schedule_command_that_is_named_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_trainer.cli.program import main
    from lora_trainer.errors import ExitCode

    monkeypatch.chdir(tmp_path)
    refused = {"S6", "S30"}
    tried = 0
    for claim in CLAIMS:
        for command in re.findall(r"`schedules ([^`]+)`", claim.answer):
            if "NAME" in command:
                continue
            with pytest.raises(SystemExit) as caught:
                main(["schedules", *shlex.split(command)])
            assert (caught.value.code or 0) == (ExitCode.CONFIG if claim.id in refused else ExitCode.DONE), command
            tried += 1
    assert tried > 25


def test_the_starting_points_are_the_presets() -> None:
    rows = {row[0].strip("`"): row for row in table(ADVICE, "## Starting points")}
    assert rows.keys() == PRESETS.keys()
    for name, preset in PRESETS.items():
        optimizer = preset.settings.get("optimizer", {})
        kind = optimizer.get("type", preset.settings.get("optimizer.type", "adamw"))
        lr = optimizer.get("lr", preset.settings.get("optimizer.lr", AdamW.model_fields["lr"].default))
        assert (rows[name][1], float(rows[name][2])) == (kind, lr)
        shown = YAML(typ="safe").load(show_preset(name))
        for key, value in preset.settings.items():
            assert reduce(lambda section, part: section[part], key.split("."), shown) == value


def test_the_usual_ranges_are_those_of_the_notes() -> None:
    told = {
        kind: (float(low), float(high))
        for kinds, low, high in table(ADVICE, "### Usual ranges")
        for kind in kinds.split(", ")
    }
    assert told == {name: row.usual_lr for name, row in OPTIMIZERS.items()}


def test_the_arithmetic_of_the_page_is_the_plans() -> None:
    for row in table(ADVICE, "## The arithmetic of steps"):
        images, repeats, processes, batch, accumulation, updates = map(int, row)
        assert steps_per_epoch([images * repeats], processes * batch * accumulation) == updates


def test_the_numbers_of_the_traps() -> None:
    assert next(j for j in range(1000) if 0.99**j <= 0.5) == 69
    assert next(j for j in range(1000) if 0.99**j <= 0.01) == 459
    assert round(0.99 ** (1 / 25), 4) == 0.9996
    assert pytest.approx(1e-4) == 0.1 ** (2000 // 500)
    assert 1 - math.exp(-0.01 * 1e-4 * 2000) == pytest.approx(0.002, rel=0.01)
    assert 1 - math.exp(-0.53 * 1e-4 * 2000) == pytest.approx(0.1, rel=0.01)
