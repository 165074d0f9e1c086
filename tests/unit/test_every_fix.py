"""Every fix that a message prints is a fix: what it says is done, and the complaint is gone (tests/fixes.py)."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from fix_rows import ADVICE, NOT_HERE, ROWS
from fixes import Text, World, apply, files_with_fixes, texts_of

from lora_trainer.config.optimizers import OPTIMIZERS

CONFIG = """
name: run
output_dir: {folder}/runs
model: {{path: {base}}}
data: {{dir: {images}, resolution: 64}}
adapter: {{rank: 2, alpha: 2}}
train: {{max_steps: 2, threads: 1}}
tracking: {{tensorboard: false}}
"""


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.mark.parametrize("file", ["", *files_with_fixes()])
def test_fixes_are_applied(
    file: str,
    tmp_path: Path,
    kept: Path,
    toy_base: Path,
    toy_images: Path,
    plain_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, texts, faults = (ROWS.get(file, ()), texts_of(file), list[str]()) if file else (ADVICE, (Text(".*", 0),), [])
    reached: set[Text] = set()
    for number, row in enumerate(rows):
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            world = World(folder, toy_base, toy_images, kept, patch)
            world.config.write_text(CONFIG.format(folder=folder, base=toy_base, images=toy_images))
            try:
                reached.update(apply(row, world, texts))
            except Exception as error:  # noqa: BLE001
                faults.append(f"row {number}, {world.words}: {error!r}")
            finally:
                world.faults.undo()
    kept = NOT_HERE.get(file, {})
    needless = [piece for piece in kept if not any(piece in text.plain for text in texts)]
    left = [t for t in texts if t not in reached and not any(piece in t.plain for piece in kept)]
    faults += [f"line {text.line}: no row applies {text.plain!r}" for text in left]
    assert not faults and not needless, "\n".join([*faults, *needless])


def test_rows_belong_to_a_file_with_fixes() -> None:
    assert {*ROWS, *NOT_HERE} <= set(files_with_fixes())


def test_extras_exist_and_hold_what_is_missing() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for row in OPTIMIZERS.values():
        if row.extra is not None:
            package = row.build.partition(":")[0].partition(".")[0].replace("_", "-")
            assert any(line.startswith(package) for line in extras[row.extra]), row
