"""What lies in the repository: every configuration loads, the generated pages are current, README's commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer.config.load import load_config
from lora_trainer.config.trials import load_sweep

ROOT = Path(__file__).parents[2]
ACTIVATION = ["source", ".venv/bin/activate"]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_every_shipped_configuration_loads() -> None:
    assert [file.name for file in CONFIGS] == ["demo.yaml", "demo_sweep.yaml", "sd15_character.yaml", "sd15_style.yaml"]
    for file in CONFIGS:
        load_config(file, [])
    assert len(load_sweep(ROOT / "configs" / "demo_sweep.yaml")[1]) == 18


@pytest.mark.parametrize("name", ["sd15_character.yaml", "sd15_style.yaml"])
def test_the_recipes_hold_images_out_and_say_how_not_to(name: str) -> None:
    file = ROOT / "configs" / name
    held = load_config(file, []).validation
    assert held is not None
    assert held.fraction == 0.1
    assert "validation=null" in file.read_text()
    assert load_config(file, ["validation=null"]).validation is None


def test_every_shipped_configuration_says_purpose_command_and_hardware() -> None:
    for file in CONFIGS:
        header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert all(word in header for word in ("Purpose:", "Command:", "Hardware:")), file.name


def test_generated_pages_are_current() -> None:
    from make_docs import DOCS, PAGES, is_current

    stale = [name for name, write in PAGES.items() if not is_current(DOCS / name, write())]
    assert not stale, f"run docs/make_docs.py: {stale}"
    assert PAGES


def test_every_schedule_has_its_picture_in_the_gallery() -> None:
    from lora_trainer.schedules.registry import SCHEDULES

    folder = ROOT / "docs" / "schedules"
    page = folder.with_suffix(".md").read_text()
    pictures = {file.name for file in folder.iterdir()}
    assert pictures == {f"{name}.png" for name in SCHEDULES} | {"six.png", "all.png"}
    assert set(re.findall(r"\]\(schedules/([^)]+)\)", page)) == pictures
    assert sum((folder / name).stat().st_size for name in pictures) < 600_000


def readme_commands() -> list[list[str]]:
    """Every command line of README's shell blocks, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_commands_exist_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Files and scripts are there, and every option is one that the command's own help names."""
    from lora_trainer.cli.program import main

    commands = readme_commands()
    assert len(commands) >= 10
    activated = commands.index(ACTIVATION)
    assert all(words[0] not in ("lora-trainer", "accelerate") for words in commands[:activated])
    assert f"{ACTIVATION[1].partition('/')[0]}/bin" in (ROOT / "scripts" / "setup_venv").read_text()
    for words in commands:
        if words == ACTIVATION:
            continue
        if words[0] != "lora-trainer":
            place = next(word for word in words if "/" in word or word.endswith(".py"))
            assert (ROOT / place).is_file(), words
            continue
        verbs = words[1:3] if words[1] == "schedules" else words[1:2]
        with pytest.raises(SystemExit):
            main([*verbs, "--help"])
        help_text = capsys.readouterr().out
        for option in (word for word in words if word.startswith("-")):
            assert re.search(rf"(^|[\s,]){re.escape(option)}\b", help_text), f"{words}: {option}"


def test_readme_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_demo_images_are_what_their_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from demo.make import make_demo_data

    monkeypatch.setattr(make_demo_data, "FOLDER", tmp_path)
    make_demo_data.main()
    shipped = sorted((ROOT / "demo" / "images").iterdir())
    assert len(shipped) == 48
    for file in shipped:
        drawn = tmp_path / file.name
        if file.suffix == ".png":
            assert Image.open(file).tobytes() == Image.open(drawn).tobytes()
        else:
            assert file.read_bytes() == drawn.read_bytes()
