"""A zoo of image folders, as people have them: every file is used, a caption, skipped or refused, and nothing hangs."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import struct
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from lora_trainer.cli.program import main
from lora_trainer.data.folders import EXTENSIONS

Content = bytes | str | Callable[[Path], object]
MOST_SECONDS = 5


class Case(NamedTuple):
    """A folder: its files, the pictures that are used, and whether something is refused."""

    name: str
    files: dict[str, Content]
    used: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    """Files that the refusals name; empty where all is well."""
    options: tuple[str, ...] = ()


def photo(seed: int = 0, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = saved(photo())
OTHER = saved(photo(1))


def pair(name: str, content: Content = GOOD, caption: Content | None = "a cat") -> dict[str, Content]:
    """A picture with its caption."""
    text = {} if caption is None else {str(Path(name).with_suffix(".txt")): caption}
    return {name: content} | text


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def node(kind: int) -> Callable[[Path], object]:
    return lambda path: os.mknod(path, kind | 0o600)


def folder(path: Path) -> None:
    path.mkdir()


SIDE = pair("side.png", OTHER)
"""A whole image with its caption, to stand beside the odd one."""
FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jpe": "JPEG",
    "jfif": "JPEG",
    "webp": "WEBP",
    "bmp": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "tiff": "TIFF",
    "PNG": "PNG",
    "JPG": "JPEG",
    "Webp": "WEBP",
    **({"avif": "AVIF"} if ".avif" in EXTENSIONS else {}),
}


def good(name: str, file: str, content: Content, *options: str) -> Case:
    return Case(name, SIDE | pair(file, content), (file, "side.png"), (), options)


def bad(name: str, file: str, content: Content, *options: str) -> Case:
    return Case(name, SIDE | pair(file, content), ("side.png",), (file,), options)


def pictures() -> Iterator[Case]:
    for ending, kind in FORMATS.items():
        yield good(f"format {ending}", f"a.{ending}", saved(photo(), kind))
    for mode in ("1", "L", "LA", "P", "RGBA"):
        yield good(f"mode {mode} png", "a.png", saved(photo(mode="RGB").convert(mode)))
    for mode in ("L", "CMYK", "YCbCr"):
        yield good(f"mode {mode} jpeg", "a.jpg", saved(photo().convert(mode), "JPEG"))
    gray = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160)
    yield good("16 bits", "a.png", saved(gray))
    yield good("16 bits, transparent", "a.png", saved(gray, transparency=0))
    yield good("16 bits tiff", "a.tif", saved(gray, "TIFF"))
    yield good("palette with transparency", "a.png", saved(photo().convert("P"), transparency=0))
    yield good("transparent webp", "a.webp", saved(photo(mode="RGBA"), "WEBP"))
    yield good("all transparent", "a.png", saved(Image.new("RGBA", (20, 20), (0, 0, 0, 0))))
    yield good("broken profile", "a.png", saved(photo(), icc_profile=b"none"))
    yield good("text chunk", "a.png", GOOD[:33] + chunk(b"tEXt", b"Comment\0" + b"x" * 5000) + GOOD[33:])
    for value in (*range(10), 255):
        exif = Image.Exif()
        exif[0x0112] = value
        yield good(f"orientation {value}", "a.jpg", saved(photo(), "JPEG", exif=exif))
    yield good("exif of garbage", "a.jpg", saved(photo(), "JPEG", exif=b"Exif\0\0garbage"))
    for size in ((1, 1), (1, 20), (20, 1), (3, 60), (1, 3000), (16, 16), (17, 33)):
        yield good(f"size {size}", "a.png", saved(photo(size=size)))
    for colour in ("white", "black", "red"):
        yield good(f"blank {colour}", "a.png", saved(Image.new("RGB", (20, 20), colour)))
    yield good("gif of two frames", "a.gif", saved(photo(), "GIF", save_all=True, append_images=[photo(1)]))
    yield good("png called jpg", "a.jpg", GOOD)
    yield good("jpeg called png", "a.png", saved(photo(), "JPEG"))
    yield good("progressive jpeg", "a.jpg", saved(photo(), "JPEG", progressive=True))
    yield good("jpeg with a tail", "a.jpg", saved(photo(), "JPEG") + b"tail" * 99)
    yield good("multi-picture jpeg", "a.jpg", saved(photo(), "MPO", save_all=True, append_images=[photo(1)]))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def damaged() -> Iterator[Case]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for kind, ending in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tif")):
        whole = saved(noise, kind)
        for share in (0.2, 0.6, 0.9):
            yield bad(f"{kind} cut at {share}", f"a.{ending}", whole[: int(len(whole) * share)])
    for ending in ("png", "jpg", "gif", "tiff"):
        yield bad(f"empty {ending}", f"a.{ending}", b"")
    yield bad("jpeg without its end", "a.jpg", saved(noise, "JPEG")[:-2])
    for name, content in {
        "html": b"<!doctype html><html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "zip": b"PK\3\4" + bytes(60),
        "zeros": bytes(500),
        "words": b"words",
        "heic head": b"\0\0\0\x1cftypheic" + bytes(40),
        "bomb": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)),
    }.items():
        yield bad(f"{name} as a picture", "a.png", content)
    for kind, ending in (("PNG", "png"), ("WEBP", "webp")):
        animated = saved(noise, kind, save_all=True, append_images=[photo(1, noise.size)])
        yield bad(f"animated {kind}", f"a.{ending}", animated)
    yield bad("floating point", "a.tif", saved(photo().convert("F"), "TIFF"))
    yield bad("ten gigabytes", "a.png", lambda path: path.touch() or os.truncate(path, 10**10))
    yield bad("pipe", "a.png", node(stat.S_IFIFO))
    yield bad("socket", "a.png", node(stat.S_IFSOCK))
    for device in ("zero", "null", "full"):
        yield bad(f"device {device}", "a.png", link(f"/dev/{device}"))
    yield bad("broken link", "a.png", link("nowhere.png"))
    yield bad("link to itself", "a.png", link("a.png"))
    yield bad("link to a pipe", "a.png", link("pipe.dat"))._replace(
        files=SIDE | pair("a.png", link("pipe.dat")) | {"pipe.dat": node(stat.S_IFIFO)}
    )
    skip = "data.on_bad_image=skip"
    yield Case("skipped", SIDE | pair("a.png", b"x"), ("side.png",), (), (skip,))
    yield Case("skipped without a caption", SIDE | {"a.png": b"x"}, ("side.png",), (), (skip,))
    two = pair("a.png", b"x") | pair("b.png", b"y")
    yield Case("too many to skip", SIDE | two, ("side.png",), ("a.png", "b.png", "data.on_bad_image"), (skip,))
    yield Case("one bad alone", pair("a.png", b"x"), (), ("a.png", "data.on_bad_image"), (skip,))
    yield Case("skipped with a caption of two", SIDE | {"side.jpg": b"x"}, ("side.png",), (), (skip,))
    yield Case("skip is for pictures alone", SIDE | {"a.png": GOOD}, ("side.png",), ("a.png",), (skip,))


def captions() -> Iterator[Case]:
    def refused(name: str, text: Content, *options: str, where: str = "a.txt") -> Case:
        return Case(f"caption {name}", SIDE | pair("a.png", GOOD, text), ("side.png",), (where, "a.png"), options)

    def fine(name: str, text: Content, *options: str) -> Case:
        return Case(f"caption {name}", SIDE | pair("a.png", GOOD, text), ("a.png", "side.png"), (), options)

    yield refused("latin-1", "schön".encode("latin-1"))
    yield refused("utf-16", "a cat".encode("utf-16"))
    yield refused("utf-16 big", b"\xfe\xff" + "a cat".encode("utf-16-be"))
    yield refused("utf-16 without a mark", "a cat".encode("utf-16-le"))
    yield refused("with NUL", b"a\0cat")
    yield refused("too large", b"x" * 100_001)
    yield refused("of ten gigabytes", lambda path: path.touch() or os.truncate(path, 10**10))
    for name, text in {"empty": b"", "blank": b" \n\t\n", "only a mark": b"\xef\xbb\xbf"}.items():
        yield refused(name, text, where="a.png")
    for name, content in {"pipe": node(stat.S_IFIFO), "broken link": link("nowhere"), "loop": link("a.txt")}.items():
        yield refused(name, content, "data.captions.missing=empty")
    yield refused("device", link("/dev/zero"))
    yield refused("folder", folder, where="a.png")
    yield refused("too long", "a caption of far too many letters", where="a.png")
    yield fine("cut", "a caption of far too many letters", "data.captions.too_long=cut")
    for name, text in {
        "with a mark": b"\xef\xbb\xbfa cat",
        "of windows": b"a cat\r\nmore\r\n",
        "of old macs": b"a cat\rmore",
        "of two paragraphs": b"a cat\n\nmore",
        "with odd ends of lines": "a\u2028b\x0bc\x85".encode(),
        "emoji": "🐈".encode(),
        "weighted": b"(cat:1.3)",
        "wildcard": b"{a|b} cat",
        "lora": b"<lora:x:1>",
        "escape": b"\x1b[31mcat",
        "by link": link("side.txt"),
    }.items():
        yield fine(name, text)
    yield fine("of all lines", b"a cat\nmore", "data.captions.lines=all")
    alone = SIDE | {"a.png": GOOD}
    yield Case("no caption", alone, ("side.png",), ("a.png",))
    yield Case("no caption, empty", alone, ("a.png", "side.png"), (), ("data.captions.missing=empty",))
    yield Case("no caption, filename", alone, ("a.png", "side.png"), (), ("data.captions.missing=filename",))
    for other in ("a.caption", "a.png.txt", "a.TXT", "a.json", "A.txt"):
        yield Case(f"caption in {other}", alone | {other: "a cat"}, ("side.png",), ("a.png",))
    ending = "data.captions.extension=.caption"
    yield Case("caption ending", {"a.png": GOOD, "a.caption": "a cat", "a.txt": "x"}, ("a.png",), (), (ending,))
    yield Case("orphan caption", SIDE | {"ghost.txt": "a cat"}, ("side.png",))
    nfd = unicodedata.normalize("NFD", "ä.png")
    yield Case("decomposed name", SIDE | {nfd: GOOD, "ä.txt": "a cat"}, ("side.png",), (nfd,))


def folders() -> Iterator[Case]:
    for name in (
        *(
            "mask",
            "masks",
            "masks_2",
            "reg",
            "regularization",
            "class_images",
            "@eaDir",
            "Thumbs",
            "#recycle",
            "$RECYCLE.BIN",
        ),
        *("lost+found", "__MACOSX", ".hidden", ".ipynb_checkpoints", "System Volume Information"),
    ):
        yield Case(f"folder {name}", SIDE | pair(f"{name}/in/a.png"), ("side.png",))
    for name in (
        *(".DS_Store", "._side.png", "Thumbs.db", "desktop.ini", "v.mp4", "v.MOV", "v.webm", "x.zip", "x.tar", "x.rar"),
        *("x.parquet", "metadata.jsonl", "metadata.csv", "dataset.toml", "meta_cap.json", "README", "x.md", "x.psd"),
        *("x.svg", "x.dng", "x.npz", "x.safetensors", "side-masklabel.png", "x.jxl", "x", "x.png~", "x.", ".png"),
    ):
        yield Case(f"beside {name}", SIDE | {name: b"\0x"}, ("side.png",))
    yield Case("beside a pipe", SIDE | {"x.dat": node(stat.S_IFIFO)}, ("side.png",))
    yield Case("beside a device", SIDE | {"x.dat": link("/dev/zero")}, ("side.png",))
    if ".heic" not in EXTENSIONS:
        yield Case("beside heic", SIDE | pair("a.heic"), ("side.png",))
    for name, files in {
        "nothing": {},
        "folders without files": {"a": folder, "b": folder},
        "only heads of heic": {"a.hif": b"x"},
        "only a tar": {"a.tar": b"x"},
        "only hidden": {".a.png": GOOD},
        "only captions": {"a.txt": "a cat"},
        "only masks": pair("masks/a.png"),
    }.items():
        if not ("heic" in name and ".hif" in EXTENSIONS):
            yield Case(name, files, (), ("",))
    yield Case("nested", pair("a/b/c/d/e.png") | SIDE, ("a/b/c/d/e.png", "side.png"))
    yield Case("same names in two folders", pair("a/x.png") | pair("b/x.png", OTHER), ("a/x.png", "b/x.png"))
    yield Case("folder called like a picture", SIDE | pair("a.png/b.png"), ("a.png/b.png", "side.png"))
    yield Case("copies", SIDE | pair("copy.png", OTHER), ("copy.png", "side.png"))
    yield Case("near-copies", SIDE | pair("near.jpg", saved(photo(1), "JPEG")), ("near.jpg", "side.png"))
    yield Case("one caption for two", SIDE | {"side.jpg": saved(photo(), "JPEG")}, ("side.jpg", "side.png"))
    yield Case("names that differ in case", pair("a.png") | pair("A.png", OTHER), ("A.png", "a.png"))
    many = {f"{number}.png": GOOD for number in range(120)}
    yield Case("many without captions", many, (), tuple(many))


def links() -> Iterator[Case]:
    away = "../away of links"
    out = pair(f"{away}/far.png") | {f"{away}/deep/x.png": OTHER, f"{away}/deep/x.txt": "a cat"}
    yield Case("link to a picture", SIDE | pair("a.png", link("side.png"), link("side.txt")), ("a.png", "side.png"))
    yield Case("link out", SIDE | out | pair("a.png", link(f"{away}/far.png")), ("a.png", "side.png"))
    yield Case("link to a folder out", SIDE | out | {"l": link(f"{away}/deep")}, ("l/x.png", "side.png"))
    yield Case("link to a folder inside", SIDE | pair("z/a.png") | {"b": link("z")}, ("side.png", "z/a.png"))
    yield Case("links to one folder", SIDE | out | {n: link(f"{away}/deep") for n in "lm"}, ("l/x.png", "side.png"))
    yield Case("link to the root", SIDE | {"l": link(".")}, ("side.png",))
    yield Case("link to everything", SIDE | {"l": link("/"), "m": link("../..")}, ("side.png",))
    yield Case("link upwards", SIDE | {"in/l": link("..")}, ("side.png",))
    yield Case("folder link to itself", SIDE | {"l": link("l")}, ("side.png",))
    yield Case("two links in a circle", SIDE | {"l": link("m"), "m": link("l")}, ("side.png",))
    yield Case("folder link to nowhere", SIDE | {"l": link("nowhere")}, ("side.png",))
    yield Case(
        "snapshot of the Hub",
        {"../hub blobs/1": GOOD, "../hub blobs/2": "a cat"}
        | pair("a.png", link("../hub blobs/1"), link("../hub blobs/2")),
        ("a.png",),
    )


def layouts() -> Iterator[Case]:
    for name in ("10_cat", "1_cat", "100_cat", "101_cat", "20231105_trip", "2023_summer", "512_crops", "3_a/5_b", "_x"):
        yield Case(f"folder {name}", SIDE | pair(f"{name}/a.png"), (f"{name}/a.png", "side.png"))
    yield Case("0_cat", SIDE | pair("0_cat/a.png"), ("side.png",), ("0_cat/a.png",))
    yield Case("digits without end", SIDE | pair(f"{'9' * 200}_x/a.png"), (f"{'9' * 200}_x/a.png", "side.png"))
    flat, kohya = "data.layout=flat", "data.layout=kohya"
    for name in ("0_cat", "10_cat"):
        yield Case(f"flat {name}", SIDE | pair(f"{name}/a.png"), (f"{name}/a.png", "side.png"), (), (flat,))
    yield Case("kohya", pair("10_cat/a.png") | pair("3_dog/in/b.png"), ("10_cat/a.png", "3_dog/in/b.png"), (), (kohya,))
    for name in ("side.png", "cats/a.png", "101_cat/a.png", "in/5_cat/a.png"):
        files = pair("10_cat/a.png") | pair(name, OTHER)
        yield Case(f"kohya and {name}", files, ("10_cat/a.png",), (name,), (kohya,))
    yield Case("10_kohya", SIDE, ("side.png",), ("",), (kohya,))
    yield Case("10_auto", SIDE, ("side.png",))


def names() -> Iterator[Case]:
    for name in (
        *(
            "ünï cödé",
            "emoji 🐈",
            "new\nline",
            "quote'\"",
            "tab\t",
            "\u202ertl",
            "x" * 240,
            "[bold]x[/bold]",
            "a b",
            "a.",
        ),
        *(
            "-c",
            "%s {0}",
            "a\\b",
            "*",
            "~",
            "$HOME",
            "a;b",
            "\x1b[31m",
            "a\u200bb",
            "\udcff",
            "ｆｕｌｌ",
            "con",
            "a.b.c",
        ),
    ):
        yield Case(f"name {name!a}"[:60], SIDE | pair(f"{name}.png"), (f"{name}.png", "side.png"))


CASES = [case for kind in (pictures, damaged, captions, folders, links, layouts, names) for case in kind()]


@pytest.fixture(scope="module")
def zoo_config(tmp_path_factory: pytest.TempPathFactory, toy_base: Path) -> Path:
    place = tmp_path_factory.mktemp("zoo")
    file = place / "zoo.yaml"
    file.write_text(
        f"name: zoo\noutput_dir: {place / 'runs'}\nmodel: {{path: {toy_base}}}\ndata: {{dir: x, resolution: 32}}\n"
        "train: {max_steps: 1}\n"
    )
    return file


@pytest.fixture
def alarm() -> Iterator[None]:
    """What hangs is interrupted."""

    def ring(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def build(root: Path, files: dict[str, Content]) -> None:
    root.mkdir()
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            content(path)


def test_there_are_many() -> None:
    assert len(CASES) == len({case.name for case in CASES}) >= 150


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_file_is_accounted_for(
    case: Case, zoo_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / (case.name if case.name.startswith("10_") else "images")
    build(root, case.files)
    began = time.process_time()
    with pytest.raises(SystemExit) as exit_info:
        main(["check", "-c", str(zoo_config), "--json", f"data.dir={root}", *case.options])
    assert time.process_time() - began < MOST_SECONDS
    assert exit_info.value.code == (3 if case.refused else 0)
    said = json.loads(capsys.readouterr().out)
    listed = {
        "used": said["used"],
        "captions": said["captions"],
        "skipped": list(said["skipped"]),
        "refused": list(dict.fromkeys(problem["where"] for problem in said["refused"])),
    }
    found = {kind: {os.path.relpath(file, root) for file in files} for kind, files in listed.items()}
    assert found["used"] == set(case.used)
    assert {Path(where).name for where in listed["refused"]} == {Path(root / where).name for where in case.refused}
    accounted = set().union(*found.values())
    assert sum(map(len, found.values())) == len(accounted)
    for place, inner, files in os.walk(root):
        for name in [*files, *(name for name in inner if os.path.islink(os.path.join(place, name)))]:
            path = Path(os.path.relpath(os.path.join(place, name), root))
            below = any(Path(other).is_relative_to(path) for other in accounted)
            assert below or any(str(outer) in accounted for outer in (path, *path.parents) if outer != Path()), path
