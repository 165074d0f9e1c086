"""What `check`, `train --dry-run` and `train` refuse before a tensor is made: with one code and in the same words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import pytest

from lora_trainer.cli.program import main
from lora_trainer.storage import disk_space

STARTS = (["check"], ["plan"], ["train", "--dry-run"], ["train"])
LONG = "a prompt of far too many letters"

FAULTS: dict[str, tuple[int, list[str], str]] = {
    "a prompt that is too long": (2, [f"sample.prompts={LONG}"], "sample.prompts[0]: the prompt has"),
    "a negative prompt that is too long": (
        2,
        ["sample.prompts=[{prompt: cat, negative_prompt: " + LONG + "}]"],
        "sample.prompts[0].negative_prompt: the prompt has",
    ),
    "options of other programs": (2, ["sample.prompts=cat --n blue --w 64"], "`--w` is no option here"),
    "a file of prompts": (2, ["sample.prompts=my/prompts.txt"], "no file of prompts is read"),
    "an optimizer's package": (5, ["optimizer.type=adamw_8bit"], "pip install 'lora_trainer[8bit]'"),
    "an output that is no folder": (5, ["output_dir={tmp}/file/runs"], "is in the way"),
    "an output that takes no files": (5, ["output_dir=/proc/runs"], "/proc: nothing can be written here"),
    "a cache that takes no files": (5, ["data.cache_dir=/proc/cache"], "another data.cache_dir"),
    "an output among the images": (2, ["output_dir={images}/runs"], "inside the image folder"),
    "a cache among the images": (2, ["data.cache_dir={images}"], "inside the image folder"),
    "images inside the run": (2, ["output_dir={tmp}", "name=images"], "inside the image folder"),
    "images below the run": (2, ["output_dir={parent}", "name={name}"], "lies inside this one, which is written"),
    "an output among the held-out images": (
        2,
        ["validation={dir: {images}}", "data.dir={other}", "output_dir={images}/runs"],
        "inside the image folder",
    ),
    "a group with the name of the first": (
        2,
        ["optimizer.groups=[{name: unet, match: [to_q], lr: 1e-4}]"],
        "is the name of all other weights",
    ),
    "a launcher that wants another precision": (5, [], "accelerate says mixed precision fp16"),
    "a disk without room for the cache": (5, ["data.cache_dir={tmp}/empty"], "latents and prompts to encode"),
    "a base that is incomplete": (4, ["model.path={tmp}/base"], "the base is incomplete"),
    "a length that resolution does not fill": (2, ["data.resolution=100"], "is no multiple of 8"),
    "a sweep's trial without its package": (
        5,
        ["validation={fraction: 0.34}", "sweep={trials: {a: [optimizer.type=adamw_8bit]}}"],
        "adamw_8bit needs",
    ),
}


def told(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a start, and what it said was wrong."""
    with pytest.raises(SystemExit) as exit_info:
        main(command)
    return int(exit_info.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_every_start_refuses_with_the_same_code_and_words(
    fault: str,
    toy_config: Path,
    toy_images: Path,
    toy_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("x")
    images = Path(shutil.copytree(toy_images, tmp_path / "images"))
    if "base" in fault:
        shutil.rmtree(Path(shutil.copytree(toy_base, tmp_path / "base")) / "vae")
    if "launcher" in fault:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    if "room" in fault:
        monkeypatch.setattr(disk_space, "free_bytes", lambda _: 3_400_000)
    places = {"{tmp}": tmp_path, "{images}": images, "{other}": toy_images}
    places |= {"{parent}": tmp_path.parent, "{name}": tmp_path.name}
    places = {key: str(place) for key, place in places.items()}
    code, written, words = FAULTS[fault]
    overrides = [
        f"data.dir={images}",
        *(reduce(lambda text, place: text.replace(*place), places.items(), word) for word in written),
    ]
    before = sorted(images.rglob("*"))
    for verb, *options in STARTS:
        assert told([verb, "-c", str(toy_config), *options, *overrides], capsys)[0] == code, verb
    everywhere = {told([verb, "-c", str(toy_config), *options, *overrides], capsys) for verb, *options in STARTS}
    assert len(everywhere) == 1
    assert words in everywhere.pop()[1]
    assert sorted(images.rglob("*")) == before


def test_a_changed_setting_of_a_run_is_refused_before_it_is_started(
    train_toy: Callable[..., Path], toy_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_toy()
    capsys.readouterr()
    changed = ["-c", str(toy_config), "optimizer.lr=2e-3"]
    starts = {told([verb, *options, *changed], capsys) for verb, *options in STARTS}
    assert len(starts) == 1
    code, words = starts.pop()
    assert code == 2
    assert "optimizer.lr: 0.001 -> 0.002" in words
    for allowed in (["--fresh"], ["resume.allow_changes=optimizer.lr"]):
        assert told(["train", "--dry-run", *changed, *allowed], capsys)[0] == 0


def test_a_run_without_its_checkpoints_is_refused_by_every_start(
    train_toy: Callable[..., Path], toy_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(train_toy() / "checkpoints")
    capsys.readouterr()
    starts = {told([verb, *options, "-c", str(toy_config)], capsys) for verb, *options in STARTS}
    assert len(starts) == 1
    code, words = starts.pop()
    assert code == 5 and "no checkpoint" in words


NOTED = {
    "train.batch_size=16": "more than the set of 6 samples",
    "train.max_steps=700": "each sample is seen 233 times",
    "train.max_steps=5": "5 updates are few",
    "train.precision=fp16": "fp16 on a CPU",
    "lr_scheduler={type: piecewise_constant, boundaries: [3], values: [1, 30]}": "peaks at 0.03, above the usual range",
    "optimizer.lr=0.02": "optimizer.lr 0.02 is above the usual range",
}


@pytest.mark.parametrize("override", NOTED)
def test_what_is_seldom_meant_is_noted_by_all_and_refused_by_none(
    override: str, toy_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for start in (["check"], ["plan"], ["train", "--dry-run"]):
        with pytest.raises(SystemExit) as exit_info:
            main([*start, "-c", str(toy_config), override])
        assert not exit_info.value.code
        assert NOTED[override] in capsys.readouterr().out
