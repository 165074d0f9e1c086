"""`lora-trainer check` finds what a run would stumble over, and leaves no run behind."""

from __future__ import annotations

import html
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_trainer.cli.program import main
from lora_trainer.config.load import load_config
from lora_trainer.data.entries import training_views
from lora_trainer.data.records import discover
from lora_trainer.models.registry import open_base, open_family


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


def test_root_without_an_image_and_the_probes_folders_are_listed_too(
    toy_config: Path, toy_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    for name in ("a.jxl", "notes.md"):
        (folder / name).write_text("x")
    probes = [f"validation={{dir: {toy_images}, prior_dir: {tmp_path / 'gone'}}}"]
    assert check("-c", str(toy_config), "--json", f"data.dir={folder}", *probes) == 3
    listed = json.loads(capsys.readouterr().out)
    assert set(listed["skipped"]) == {str(folder / "a.jxl"), str(folder / "notes.md")}
    assert set(listed["used"]) == {str(file) for file in toy_images.glob("*.png")}
    assert {problem["where"] for problem in listed["refused"]} == {str(folder), str(tmp_path / "gone")}
    assert check("-c", str(toy_config), f"data.dir={folder}", *probes) == 3
    said = capsys.readouterr().err
    assert "no images here" in said
    assert "gone: the image folder does not exist" in said


def test_what_the_encoders_get_is_shown(toy_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "few", tmp_path / "runs" / "toy-check"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a <b>.png")
    (folder / "a <b>.txt").write_text("a <cat> of far too many letters")
    options = ["-c", str(toy_config), f"data.dir={folder}", "data.captions.too_long=cut", "data.flip=true"]
    options += ["data.crop=random", "data.crops_per_image=2"]
    assert check(*options, "--show", "9") == 0
    said = capsys.readouterr().out
    assert str(out / "index.html") in said
    assert "1 captions are longer" in said
    assert "a <b>.png loses `" in said
    shown = [np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))]
    config = load_config(toy_config, options[2:])
    dataset = discover(config.data, tmp_path / "checked.json", lambda items, *_: items)
    views = list(training_views(config, dataset.records).values())
    assert len(shown) == len(views) == 4
    for square, image in zip(shown, views, strict=True):
        x, y = image.view.left, image.view.top
        scaled = np.asarray(Image.fromarray(pixels).resize(image.view.scaled_size, Image.Resampling.LANCZOS))
        cut = scaled[y : y + 64, x : x + 64]
        assert np.array_equal(square, cut[:, ::-1] if image.mirrored else cut)
    kept = (out / "0001.txt").read_text().removesuffix("\n")
    assert "a <cat> of far too many letters".startswith(kept)
    assert open_family(open_base(**config.model.model_dump())).count_tokens(kept) == 16
    page = (out / "index.html").read_text()
    assert "a &lt;b&gt;.png" in page
    assert f"{html.escape(kept)}<del>" in page
    (out / "mine.md").write_text("x")
    assert check(*options, "--show", "1") == 0
    assert {file.name for file in out.iterdir()} == {"0001.png", "0001.txt", "index.html", "mine.md"}
    (out / "index.html").write_text("mine")
    assert check(*options, "--show", "1") == 2
    assert (out / "index.html").read_text() == "mine"


def test_options_of_check_that_exclude_each_other(toy_config: Path) -> None:
    assert check("-c", str(toy_config), "--json", "--show", "3") == 2


def test_a_list_of_files_ends_with_the_code_of_check(
    toy_config: Path, toy_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (
        "data.resolution=66",
        "adapter.targets=[nothing]",
        "sample.prompts=x --ar 3:2",
        "output_dir=/dev/null",
    ):
        code = check("-c", str(toy_config), wrong)
        capsys.readouterr()
        assert check("-c", str(toy_config), "--json", wrong) == code != 0
        assert len(json.loads(capsys.readouterr().out)["used"]) == 6
