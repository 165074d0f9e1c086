"""Finding images and captions: every layout people use, and one report of all that is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_trainer.config.schema import DataConfig
from lora_trainer.data.records import Dataset, content_digest, discover, survey
from lora_trainer.errors import DataError, ExitCode


def picture(file: Path, colour: int = 0, caption: str | None = "a cat") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), (colour, 0, 0)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption)
    return file


def found(folder: Path, **options: object) -> Dataset:
    settings = {"dir": str(folder / "images"), "resolution": 32, **options}
    return discover(DataConfig.model_validate(settings), folder / "checked.json", lambda items, *_: items)


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        found(folder, **options)
    assert caught.value.exit_code == ExitCode.DATA
    return str(caught.value)


def test_flat_nested_and_repeat_folders(tmp_path: Path) -> None:
    images = tmp_path / "images"
    picture(images / "a.png", 1)
    picture(images / "deep" / "er" / "b.JPG", 2)
    picture(images / "10_cat" / "c.webp", 3)
    picture(images / "3_dog" / "in" / "d.bmp", 4)
    (images / ".hidden").mkdir()
    picture(images / ".hidden" / "e.png", 5)
    dataset = found(tmp_path)
    assert {r.name: r.repeats for r in dataset.records} == {
        "10_cat/c.webp": 10,
        "3_dog/in/d.bmp": 3,
        "a.png": 1,
        "deep/er/b.JPG": 1,
    }
    assert dataset.num_samples == 15
    assert list(dataset.samples()) == [0] * 10 + [1] * 3 + [2] + [3]


def test_large_numbers_before_a_folders_name_are_no_repeats(tmp_path: Path) -> None:
    images = tmp_path / "images"
    folders = ["100_cat", "101_cat", "20231105_trip", "2023_summer", "512_crops", "5_cat/2024_winter"]
    for number, folder in enumerate(folders):
        picture(images / folder / "a.png", number)
    dataset = found(tmp_path)
    assert [r.repeats for r in dataset.records] == [100, 1, 1, 1, 1, 5]
    said = "is taken as a name, not as 101 repeats; write data.sources with repeats to repeat it"
    assert f"folder `101_cat` {said}" in dataset.notes
    assert any(note.startswith("4 more folders are taken as names") for note in dataset.notes)
    (images / "101_cat").rename(images / "cat")
    (note,) = (note for note in found(tmp_path).notes if "as a name" in note)
    assert "20231105_trip" in note


def test_a_usual_number_of_repeats_needs_no_note(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "10_cat" / "a.png")
    assert not any("taken as" in note for note in found(tmp_path).notes)


def test_samples_are_looked_up_and_never_written_out(tmp_path: Path) -> None:
    for number in range(2):
        picture(tmp_path / str(number) / "a.png", number)
    sources = [{"dir": str(tmp_path / str(number)), "repeats": 10**6} for number in range(2)]
    samples = found(tmp_path, dir=None, sources=sources).samples()
    places = (0, 10**6 - 1, 10**6, 2 * 10**6 - 1)
    assert (len(samples), [samples[place] for place in places]) == (2 * 10**6, [0, 0, 1, 1])
    with pytest.raises(IndexError):
        samples[2 * 10**6]


def test_sources_multiply_repeats(tmp_path: Path) -> None:
    picture(tmp_path / "one" / "2_x" / "a.png", 1)
    picture(tmp_path / "two" / "b.png", 2)
    sources = [{"dir": str(tmp_path / "one"), "repeats": 3}, {"dir": str(tmp_path / "two")}]
    dataset = found(tmp_path, dir=None, sources=sources)
    assert [r.repeats for r in dataset.records] == [6, 1]


def test_captions_first_line_all_lines_bom(tmp_path: Path) -> None:
    file = picture(tmp_path / "images" / "a.png")
    file.with_suffix(".txt").write_bytes("\ufeffein Bär\r\n\r\nzweite Zeile \r\n".encode())
    assert found(tmp_path).records[0].captions == ("ein Bär",)
    assert found(tmp_path, captions={"lines": "all"}).records[0].captions == ("ein Bär", "zweite Zeile")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("schön".encode("latin-1"), "byte 3 is 0xf6"),
        ("a cat".encode("utf-16"), "UTF-16"),
        (b"a\0cat", "NUL"),
        (b"x" * 100_001, "a text file that you may read"),
    ],
)
def test_unreadable_captions_name_the_file(tmp_path: Path, raw: bytes, said: str) -> None:
    file = picture(tmp_path / "images" / "a.png")
    file.with_suffix(".txt").write_bytes(raw)
    message = refusal(tmp_path)
    assert "a.txt" in message
    assert said in message


def test_missing_captions_by_policy(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "my_black-cat (2).png", caption=None)
    picture(tmp_path / "images" / "5_tabby cat" / "001.png", caption=None)
    assert "has no caption" in refusal(tmp_path)
    assert [r.captions for r in found(tmp_path, captions={"missing": "empty"}).records] == [("",), ("",)]
    named = found(tmp_path, captions={"missing": "filename"})
    assert [r.captions for r in named.records] == [("tabby cat",), ("my black cat",)]
    assert "captions: 0 of 2 from .txt files; 2 by policy `filename`" in named.notes


def test_a_class_folder_is_the_caption_as_in_kohya(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "5_tabby cat" / "DSC0001.png", caption=None)
    dataset = found(tmp_path, captions={"missing": "filename"})
    assert dataset.records[0].captions == ("tabby cat",)
    assert "captions from names: 5_tabby cat/DSC0001.png `tabby cat`" in dataset.notes


def test_lines_end_where_editors_end_them_and_a_second_one_is_told(tmp_path: Path) -> None:
    file = picture(tmp_path / "images" / "a.png", caption="one\u2028two\x0bthree\x85four")
    assert found(tmp_path).records[0].captions == ("one\u2028two\x0bthree\x85four",)
    assert not any("several lines" in note for note in found(tmp_path).notes)
    file.with_suffix(".txt").write_text("first\rsecond\n\nthird")
    assert found(tmp_path, captions={"lines": "all"}).records[0].captions == ("first", "second", "third")
    assert any("several lines" in note and "a.png" in note for note in found(tmp_path).notes)


def test_captions_under_another_ending_are_noticed(tmp_path: Path) -> None:
    file = picture(tmp_path / "images" / "a.png", caption=None)
    file.with_suffix(".caption").write_text("a cat")
    assert "data.captions.extension: .caption" in refusal(tmp_path)
    assert found(tmp_path, captions={"extension": ".caption"}).records[0].captions == ("a cat",)


def test_all_broken_files_in_one_report(tmp_path: Path) -> None:
    images = tmp_path / "images"
    whole = picture(images / "good.png").read_bytes()
    for name, content in {"empty.png": b"", "text.jpg": b"hello", "half.png": whole[: len(whole) // 2]}.items():
        (images / name).write_bytes(content)
        (images / name).with_suffix(".txt").write_text("x")
    picture(images / "silent.png", caption=None)
    message = refusal(tmp_path)
    for name in ("empty.png", "text.jpg", "half.png", "silent.png"):
        assert name in message
    assert "good.png" not in message


def test_an_empty_folder_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.md").write_text("x")
    message = refusal(tmp_path)
    assert str(tmp_path / "images") in message
    assert ".png, .jpg" in message
    assert "1 x .md" in message


def test_a_missing_folder_or_a_file_in_its_place(tmp_path: Path) -> None:
    assert f"{tmp_path / 'images'}: the image folder does not exist" in refusal(tmp_path)
    (tmp_path / "images").write_text("x")
    assert "is a file" in refusal(tmp_path)


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    images = tmp_path / "images"
    picture(images / "a.png", 1)
    picture(images / "z" / "b.png", 2)
    (images / "loop").symlink_to(images)
    (images / "again").symlink_to(images / "z")
    (images / "c.png").symlink_to(picture(tmp_path / "blobs" / "1.png", 3))
    (images / "c.txt").symlink_to(tmp_path / "blobs" / "1.txt")
    (images / "out").symlink_to(picture(tmp_path / "far" / "d.png", 4).parent)
    assert [r.name for r in found(tmp_path).records] == ["a.png", "c.png", "out/d.png", "z/b.png"]
    for name in ("self.png", "own_folder"):
        (images / name).symlink_to(images / name)
    (images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    message = refusal(tmp_path)
    assert "self.png" in message
    assert "gone.png" in message


def test_what_is_no_file_is_refused_unopened(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    os.mkfifo(tmp_path / "images" / "pipe.png")
    os.mkfifo(tmp_path / "images" / "a.caption")
    assert "it is a pipe" in refusal(tmp_path)
    assert "caption" in refusal(tmp_path, captions={"extension": ".caption"})


@pytest.mark.parametrize("garbage", ["[]", '{"a": 1}', '{"a": [1, 2, 3]}', '{"a": ["x", -1]}', "[" * 100_000, "\0"])
def test_what_was_remembered_may_be_garbage(tmp_path: Path, garbage: str) -> None:
    file = picture(tmp_path / "images" / "a.png")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "checked.json").write_text(garbage.replace('"a"', f'"{digest}"'))
    assert found(tmp_path).records[0].size == (64, 48)


def test_a_failed_check_remembers_what_it_looked_at(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_text("text")
    assert "b.png" in refusal(tmp_path)
    assert len(json.loads((tmp_path / "checked.json").read_text())) == 1


def test_every_file_is_used_skipped_or_refused(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, name in enumerate(("a.png", "3_cat/b.jpg", "mask/a.png", "reg/1_toy/c.png", "a-masklabel.png")):
        picture(images / name, number)
    for name in ("@eaDir/a/t.jpg", "#recycle/a.png", "$RECYCLE.BIN/b.png", "lost+found/c.png", "__MACOSX/d.png"):
        picture(images / name, 9)
    others = ("ghost.txt", "a.caption", "metadata.jsonl", "v.mp4", "i.jxl", "README", "dataset.toml", ".DS_Store")
    for name in (*others, "B.TXT", "broken.png", "sub/e.tar"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_text("x")
    picture(images / "silent.png", caption=None)
    config = DataConfig.model_validate({"dir": str(images), "resolution": 32})
    dataset, problems = survey(config, tmp_path / "checked.json", lambda items, *_: items)
    assert [record.name for record in dataset.records] == ["3_cat/b.jpg", "a.png"]
    refused = {Path(problem.where or "") for problem in problems}
    assert {file.name for file in refused} == {"broken.png", "silent.png"}
    kinds = [{r.path for r in dataset.records}, set(dataset.caption_files), {f for f, _ in dataset.skipped}, refused]
    counted = set().union(*kinds)
    assert sum(map(len, kinds)) == len(counted)
    for file in images.rglob("*"):
        assert file.is_dir() or counted & {file, *file.parents}, file
    for file in refused:
        file.unlink()
    notes = "\n".join(found(tmp_path).notes)
    for said in ("ghost.txt", "metadata.jsonl", "v.mp4", "JPEG XL", "mask", "reg", "1 skipped, hidden"):
        assert said in notes


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "images" / "a.png")
    closed = picture(tmp_path / "images" / "closed" / "b.png").parent
    scandir = os.scandir

    def refusing(folder: Path) -> object:
        if Path(folder) == closed:
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    assert str(closed) in refusal(tmp_path)


def test_problems_of_a_kind_are_counted_after_five(tmp_path: Path) -> None:
    for number in range(9):
        picture(tmp_path / "images" / f"{number}.png", number, caption=None)
    assert refusal(tmp_path).count("looked for") == 5
    assert "4 more" in refusal(tmp_path)


def test_names_of_every_kind(tmp_path: Path) -> None:
    names = ["ünï cödé.png", "emoji 🐈.png", "new\nline.png", "x" * 200 + ".png"]
    for index, name in enumerate(names):
        picture(tmp_path / "images" / name, index)
    assert {r.name for r in found(tmp_path).records} == set(names)


def test_notes_tell_crops_enlargements_twins_and_shared_captions(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", 1)
    picture(tmp_path / "images" / "a.bmp", 1)
    picture(tmp_path / "images" / "b.png", 1)
    notes = " | ".join(found(tmp_path, resolution=56).notes)
    assert "loses 25% of the picture on average" in notes
    assert "3 of 3 images are smaller than 56 px" in notes
    assert "same content" in notes
    assert "share one caption" in notes


def test_the_digest_follows_content_not_names(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", 1)
    before = content_digest(found(tmp_path).records)
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "z.png")
    (tmp_path / "images" / "a.txt").rename(tmp_path / "images" / "z.txt")
    assert content_digest(found(tmp_path).records) == before
    (tmp_path / "images" / "z.txt").write_text("another cat")
    assert content_digest(found(tmp_path).records) != before


def test_user_files_stay_as_they_are(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", 1)

    def state() -> list[tuple[str, str, int]]:
        files = sorted((tmp_path / "images").rglob("*"))
        return [(f.name, hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files]

    before = state()
    found(tmp_path)
    assert state() == before


def test_near_copies_are_named_in_groups(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC)
    for name, image in {"a.png": photo, "b.jpg": photo, "c.png": photo.resize((60, 40))}.items():
        image.save(picture(tmp_path / "images" / name, 5))
    picture(tmp_path / "images" / "flat.png", 6)
    notes = found(tmp_path).notes
    assert any("3 images look nearly alike" in note and "a.png, b.jpg, c.png" in note for note in notes)
    assert any("too plain" in note and "flat.png" in note for note in notes)
    assert found(tmp_path).notes == notes  # from what is remembered


def test_what_an_earlier_version_remembered_is_decoded_again(tmp_path: Path) -> None:
    files = [picture(tmp_path / "images" / f"{number}.png", number) for number in range(2)]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    (tmp_path / "checked.json").write_text(json.dumps({digests[0]: [64, 48], digests[1]: [64, 48, "0" * 16]}))
    assert [record.size for record in found(tmp_path).records] == [(64, 48)] * 2
    assert {len(row) for row in json.loads((tmp_path / "checked.json").read_text()).values()} == {3}


def test_an_image_without_its_caption_is_remembered_too(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", caption=None)
    assert "no caption" in refusal(tmp_path)
    assert len(json.loads((tmp_path / "checked.json").read_text())) == 1


def test_bad_images_are_left_out_where_that_is_asked_for_and_never_more_than_a_tenth(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(19):
        picture(images / f"{number:02}.png", number)
    whole = (images / "00.png").read_bytes()
    for name in ("bad.png", "cut.png"):
        picture(images / name).write_bytes(whole[:60])
    (images / "cut.txt").unlink()
    assert "bad.png" in refusal(tmp_path)
    dataset = found(tmp_path, on_bad_image="skip")
    assert len(dataset.records) == 19
    skipped = {path.name: reason for path, reason in dataset.skipped}
    assert set(skipped) == {"bad.png", "bad.txt", "cut.png"}
    assert images / "bad.txt" not in dataset.caption_files
    assert any("2 skipped, not a usable image, left out by data.on_bad_image" in note for note in dataset.notes)
    picture(images / "third.png").write_bytes(b"text")
    message = refusal(tmp_path, on_bad_image="skip")
    assert "3 of 22 images are not usable" in message
    assert "third.png" in message
    (images / "third.png").unlink()
    (images / "05.txt").unlink()
    assert "no caption" in refusal(tmp_path, on_bad_image="skip")


def test_the_only_image_is_never_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png").write_bytes(b"text")
    assert "1 of 1 images are not usable" in refusal(tmp_path, on_bad_image="skip")


def test_a_flat_layout_takes_no_folder_for_repeats_or_a_caption(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "5_tabby cat" / "old_dog.png", caption=None)
    options = {"captions": {"missing": "filename"}}
    assert [(r.repeats, r.captions) for r in found(tmp_path, **options).records] == [(5, ("tabby cat",))]
    assert "data.layout auto: 1 folders repeat their images: `5_tabby cat` x 5" in found(tmp_path, **options).notes
    flat = found(tmp_path, layout="flat", **options)
    assert [(r.repeats, r.captions) for r in flat.records] == [(1, ("old dog",))]
    assert any(note == "data.layout flat: 1 folders are mere names: `5_tabby cat` x 5" for note in flat.notes)


def test_kohyas_layout_is_all_or_nothing(tmp_path: Path) -> None:
    images = tmp_path / "images"
    picture(images / "10_cat" / "3_close" / "a.png", 1)
    assert [r.repeats for r in found(tmp_path).records] == [3]
    dataset = found(tmp_path, layout="kohya")
    assert [r.repeats for r in dataset.records] == [10]
    assert "data.layout kohya: 1 folders repeat their images: `10_cat` x 10" in dataset.notes
    for number, name in enumerate(("loose.png", "dogs/b.png", "200_birds/c.png", "in/5_x/d.png")):
        picture(images / name, number)
    message = refusal(tmp_path, layout="kohya")
    for name in ("loose.png", "b.png", "c.png", "d.png"):
        assert name in message
    assert "data.layout: flat" in message
    assert "a.png" not in message


def test_the_folder_with_the_number_itself_is_not_its_root(tmp_path: Path) -> None:
    root = picture(tmp_path / "10_zkc plushie" / "a.png").parent
    said = "`10_zkc plushie` is given as the folder itself, and its number repeats nothing"
    assert any(said in note for note in found(tmp_path, dir=str(root)).notes)
    assert "is the folder around `10_zkc plushie`" in refusal(tmp_path, dir=str(root), layout="kohya")
    assert found(tmp_path, dir=str(tmp_path), layout="kohya").records[0].repeats == 10


def test_a_source_in_another_is_one_note(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, name in enumerate(("a.png", "in/b.png", "mask/c.png")):
        picture(images / name, number)
    sources = [{"dir": str(images)}, {"dir": str(images / "in")}, {"dir": str(images / "mask")}]
    dataset = found(tmp_path, dir=None, sources=sources)
    assert [r.path.name for r in dataset.records] == ["a.png", "b.png", "b.png", "c.png"]
    about = [note for note in dataset.notes if "one source lies in the other" in note or "same content" in note]
    assert about == ["one source lies in the other, so that these count in both: in/b.png, b.png"]
    assert dataset.skipped == ()
    assert len(dataset.caption_files) == 3


def test_all_missing_folders_and_faults_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "one" / "a.png", caption=None)
    sources = [{"dir": str(tmp_path / name)} for name in ("one", "two", "three")]
    message = refusal(tmp_path, dir=None, sources=sources)
    for said in ("a.png", "two: the image folder does not exist", "three: the image folder does not exist"):
        assert said in message


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a (red:1.3) cat", "(red:1.3)"),
        ("a {red|blue} cat", "{red|blue}"),
        ("a cat <lora:x:0.8>", "<lora:x:0.8>"),
        ("a cat (sitting), {nothing} at 12:30 <3", None),
        ("{" + "|" * 90_000, None),
    ],
)
def test_prompt_syntax_in_captions_is_told(tmp_path: Path, caption: str, said: str | None) -> None:
    picture(tmp_path / "images" / "a.png", caption=caption)
    notes = [note for note in found(tmp_path).notes if "prompt syntax" in note]
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


def test_the_least_image_and_the_longest_strip_are_named_first(tmp_path: Path) -> None:
    for name, size in {"usual.png": (31, 31), "long.png": (90, 30), "tiny.png": (7, 7)}.items():
        Image.new("RGB", size).save(picture(tmp_path / "images" / name))
    notes = found(tmp_path).notes
    assert (
        "3 of 3 images are smaller than 32 px and are enlarged, up to 4.6 times: tiny.png, long.png, usual.png" in notes
    )
    assert any("most: long.png 67%" in note for note in notes)


@pytest.mark.parametrize("other", ["a.png.txt", "a.TXT", "a.json", "metadata.jsonl"])
def test_a_caption_under_another_name_is_noticed(tmp_path: Path, other: str) -> None:
    picture(tmp_path / "images" / "a.png", caption=None).with_name(other).write_text("a cat")
    assert f"{other} is there" in refusal(tmp_path)


def test_a_caption_whose_name_is_composed_otherwise_is_noticed(tmp_path: Path) -> None:
    picture(tmp_path / "images" / unicodedata.normalize("NFD", "ä.png"), caption=None).with_name("ä.txt").write_text(
        "x"
    )
    assert "ä.txt is there, which is not read" in refusal(tmp_path)


@pytest.mark.parametrize("policy", ["error", "filename", "empty"])
def test_a_caption_that_is_no_file_is_refused_whatever_the_policy(tmp_path: Path, policy: str) -> None:
    picture(tmp_path / "images" / "a.png", caption=None).with_suffix(".txt").symlink_to("nowhere.txt")
    assert "a.txt: the caption cannot be read" in refusal(tmp_path, captions={"missing": policy})
