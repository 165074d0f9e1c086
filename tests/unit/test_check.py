"""`lora-trainer check` finds what a run would stumble over, and leaves no run behind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer.cli.program import main


def check(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(["check", *arguments])
    return int(exit_info.value.code or 0)


def test_a_sound_run_is_said_to_be_so(toy_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("-c", str(toy_config)) == 0
    said = capsys.readouterr().out
    assert "is a whole sd folder, epsilon prediction" in said
    assert "can be read and have their captions" in said
    assert not (tmp_path / "runs" / "toy").exists()


def test_each_fault_has_its_exit_code(toy_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert check("-c", str(toy_config), "optimizer.lrr=1") == 2
    assert check("-c", str(toy_config), f"data.dir={tmp_path / 'empty'}") == 3
    assert check("-c", str(toy_config), f"model.path={tmp_path / 'empty'}") == 4
    assert "did you mean" in capsys.readouterr().err


def test_a_base_without_its_vocabulary_is_refused_by_check_and_train(
    toy_config: Path, toy_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(toy_base, tmp_path / "base"))
    (base / "tokenizer" / "tokenizer.json").unlink()
    for verb in ("check", "train"):
        with pytest.raises(SystemExit) as exit_info:
            main([verb, "-c", str(toy_config), f"model.path={base}"])
        assert exit_info.value.code == 4


def test_config_only_leaves_base_and_images_alone(toy_config: Path) -> None:
    assert check("-c", str(toy_config), "--config-only", "model.path=nowhere", "data.dir=nowhere") == 0


@pytest.mark.process
def test_torch_stays_unloaded(toy_config: Path, program: object) -> None:
    code = (
        "import sys; from lora_trainer.cli.plan import check; from pathlib import Path;"
        f"check(Path({str(toy_config)!r}), []); sys.exit('torch' in sys.modules)"
    )
    done = program([sys.executable, "-c", code])  # type: ignore[operator]
    assert done.returncode == 0, done.stderr


def test_long_captions_are_known_before_torch(
    toy_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "a.txt").write_text("a caption of far too many letters")
    assert check("-c", str(toy_config), f"data.dir={folder}") == 3
    assert "has 27 tokens, the text encoder reads 14" in capsys.readouterr().err
    assert check("-c", str(toy_config), f"data.dir={folder}", "data.captions.too_long=cut") == 0
    assert "1 captions are longer" in capsys.readouterr().out


def test_every_file_of_the_image_folder_is_listed(
    toy_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "a.txt").write_text("a cat")
    (folder / "b.jpg").write_text("no picture")
    (folder / "c.mp4").write_text("x")
    assert check("-c", str(toy_config), "--json", f"data.dir={folder}") == 3
    listed = json.loads(capsys.readouterr().out)
    assert (listed["used"], listed["captions"]) == ([str(folder / "a.png")], [str(folder / "a.txt")])
    assert list(listed["skipped"]) == [str(folder / "c.mp4")]
    assert {problem["where"] for problem in listed["refused"]} == {str(folder / "b.jpg")}
