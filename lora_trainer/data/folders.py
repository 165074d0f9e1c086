"""What lies in an image folder: each file is a picture, a caption, skipped for a reason, or refused.

Links are followed, to files and to folders; a folder is read once, under its own name where it has one. Nothing is
opened here, so that a pipe or a device cannot block. A folder `N_name` asks for N repeats, as in kohya's layout.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from PIL import features

from lora_trainer.errors import Problem

AVIF, HEIF = features.check("avif"), find_spec("pillow_heif") is not None

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".jfif", ".jpe", ".tif", ".tiff"),
    *((".avif",) if AVIF else ()),
    *((".heic", ".heif", ".hif") if HEIF else ()),
)
PACKAGES = dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif") | {".avif": "-U pillow"}
"""What to install, by the ending, for kinds of pictures that are read only with it."""
CAPTION_ENDINGS = (".txt", ".caption")
BAD_IMAGE, MEND_IMAGE = "not a usable image", "replace the file or take it out"
SHOWN = 5
"""Files of a kind that a message names; `check --json` lists all."""
_HIDDEN = "hidden"
_FOLDERS = (
    (("@eadir", "thumbs", "thumbnails", "_thumbs"), "a folder of thumbnails"),
    (("#recycle", "$recycle.bin", "@recycle", "recycler", "lost+found"), "a bin of deleted files"),
    (("__macosx", "system volume information", "#snapshot"), "a folder of the system"),
    (("mask", "masks"), "a folder of masks, which are not used; to train on it as pictures, give it as a source"),
    (
        ("reg", "reg_images", "regularization", "regularisation", "regularization_images", "class_images"),
        "a folder of regularisation images, which are not used; to train on it as pictures, give it as a source",
    ),
)
_FOLDER_REASONS = {name: reason for names, reason in _FOLDERS for name in names}
_MASK_ENDINGS = ("-masklabel", "-condlabel")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z", ".parquet")
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "dataset.toml", "meta_cap.json", "meta_lat.json")

Layout = Literal["auto", "flat", "kohya"]
_REPEATS_FOLDER = re.compile(r"(\d+)_.*")
MAX_FOLDER_REPEATS = 100
"""The largest N that a folder `N_name` asks for; a larger number is part of a name: a year, a date, a size."""


@dataclass(slots=True)
class Inventory:
    """Every entry of a folder. A folder in `skipped` stands for all that lies in it."""

    images: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def take_stock(root: Path, caption_ending: str) -> Inventory:
    """All that lies under a root, pictures by name."""
    stock, files, folders = Inventory(), [], [root]
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents)}
    links: list[Path] = []
    while folders or links:  # links last: a folder that lies under the root keeps its own name
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                stock.skipped[folder] = "a link to a folder that is read already, or that lies around this one"
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            fix = "check its permissions, or take it out"
            stock.problems.append(Problem("the folder cannot be read", str(folder), error.strerror, fix))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                stock.skipped[path] = _HIDDEN
            elif not is_folder(path):
                files.append(path)
            elif reason := _FOLDER_REASONS.get(re.sub(r"_?\d+$", "", entry.name.lower())):
                stock.skipped[path] = reason
            else:
                (links if entry.is_symlink() else folders).append(path)
    _sort_in(stock, files, caption_ending)
    stock.images.sort(key=Path.as_posix)
    return stock


def is_file(path: Path) -> bool:
    """Whether a file is there that may be read; unlike `Path.is_file` it never raises."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether a folder is there; unlike `Path.is_dir` it never raises."""
    return os.path.isdir(path)  # noqa: PTH112


def skipped_notes(skipped: Iterable[tuple[Path, str]]) -> Iterator[str]:
    """A line for each reason, with the first files; hidden ones are only counted."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in skipped:
        by_reason.setdefault(reason, []).append("/".join(path.parts[-2:]))
    for reason, names in by_reason.items():
        yield f"{len(names)} skipped, {reason}" + ("" if reason == _HIDDEN else f": {some(names)}")


def some(names: list[str], between: str = ", ") -> str:
    """The first names, and how many more there are."""
    return between.join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def few_of_a_kind(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The first problems of each kind whole, the others counted; numbers make no kind."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"\d+", "", problem.what), []).append(problem)
    for alike in kinds.values():
        yield from alike[:SHOWN]
        if len(alike) > SHOWN:
            what = f"and {len(alike) - SHOWN} more like: {alike[0].what}"
            yield Problem(what, fix="`lora-trainer check --json` lists every one")


def _sort_in(stock: Inventory, files: list[Path], caption_ending: str) -> None:
    """Each file to its kind; a caption belongs to the picture that it is named like."""
    stems = {file.with_suffix("") for file in files if file.suffix.lower() in EXTENSIONS}
    for file in files:
        ending = file.suffix.lower()
        if ending in EXTENSIONS and file.stem.endswith(_MASK_ENDINGS):
            stock.skipped[file] = "a mask; masks are not used"
        elif ending in EXTENSIONS:
            if (fault := _not_regular(file)) is None:
                stock.images.append(file)
            else:
                stock.problems.append(Problem(BAD_IMAGE, str(file), fault, MEND_IMAGE))
        elif file.suffix == caption_ending and file.with_suffix("") in stems:
            stock.captions.append(file)
        else:
            stock.skipped[file] = _why_skipped(file, caption_ending)


def _why_skipped(file: Path, caption_ending: str) -> str:
    """Why a file that is neither picture nor caption is left out."""
    ending = file.suffix.lower()
    if file.name.lower() in LISTS:
        return f"lists are not read yet, captions are read from {caption_ending} files beside the pictures"
    if file.suffix == caption_ending:
        return "a caption without its picture"
    if ending in (*CAPTION_ENDINGS, ".json") or ending == caption_ending.lower():
        return f"captions are read from files that end in {caption_ending}"
    if ending in PACKAGES:
        return f"{ending} is read after pip install {PACKAGES[ending]}"
    if ending in _ARCHIVES:
        return f"{ending}: unpack it into pictures and captions"
    if ending == ".jxl":
        return "JPEG XL is not read: make it PNG or JPEG"
    return f"{ending or 'no ending'}: not a kind of picture that is read"


def _not_regular(file: Path) -> str | None:
    """Why a file must not be opened; None where it may."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return "it is a link to a file that is not there"
    except OSError as error:
        return error.strerror
    if stat.S_ISREG(mode):
        return None
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return f"it is {next((name for test, name in kinds if test(mode)), 'a device')}, not a file"


def number_before(folder: str) -> int | None:
    """N of a folder that is named `N_name` and asks for repeats."""
    match = _REPEATS_FOLDER.fullmatch(folder)
    number = int(match[1]) if match else MAX_FOLDER_REPEATS + 1
    return number if number <= MAX_FOLDER_REPEATS else None


def repeats_of(relative: Path, layout: Layout) -> int:
    """How often the folders around an image ask to see it: the nearest one that asks; in kohya's layout the first."""
    folder = _asking_folder(relative, layout)
    return 1 if folder is None else number_before(folder.name) or 0


def _asking_folder(relative: Path, layout: Layout) -> Path | None:
    folders = [*relative.parents][:-1]
    if layout == "kohya":
        folders = folders[-1:]
    asking = (folder for folder in folders if number_before(folder.name) is not None)
    return None if layout == "flat" else next(asking, None)


def layout_problems(root: Path, images: Iterable[Path], layout: Layout) -> Iterator[Problem]:
    """The images that have no place in kohya's layout."""
    if layout != "kohya":
        return
    outside = [path for path in images if _asking_folder(path.relative_to(root), layout) is None]
    name = root.absolute().name
    if outside and number_before(name) is not None:
        what = f"in kohya's layout data.dir is the folder around `{name}`, not that folder itself"
        yield Problem(what, str(root), fix=f"point data.dir at {root.absolute().parent}, or set data.layout: flat")
        return
    for path in outside:
        why = f"kohya's layout is <data.dir>/N_name/ with N up to {MAX_FOLDER_REPEATS}"
        fix = "move it into such a folder, or set data.layout: flat, with repeats written in data.sources"
        yield Problem("the image lies in no folder `N_name`", str(path), why, fix)


def layout_notes(names: Iterable[str], roots: Iterable[str], layout: Layout) -> Iterator[str]:
    """Which folders ask for which repeats, and which are named as if they did."""
    relative = [Path(name) for name in names]
    seen = {_asking_folder(path, "auto" if layout == "flat" else layout) for path in relative}
    if listed := [f"`{folder}` x {number_before(folder.name)}" for folder in sorted(filter(None, seen))]:
        what = "are mere names" if layout == "flat" else "repeat their images"
        yield f"data.layout {layout}: {len(listed)} folders {what}: {some(listed)}"
    for root in roots if layout == "auto" else ():
        name = Path(root).absolute().name
        if (number_before(name) or 1) > 1:
            what = f"`{name}` is given as the folder itself, and its number repeats nothing"
            yield f"{what}; for repeats give the folder around it, or write data.sources with repeats"
    if layout == "auto":
        yield from _mere_names({part for path in relative for part in path.parts[:-1]})


def _mere_names(folders: Iterable[str]) -> Iterator[str]:
    """Folders named `N_name` whose N is no number of repeats."""
    first, *others = sorted(f for f in folders if _REPEATS_FOLDER.fullmatch(f) and number_before(f) is None) or [""]
    if first:
        asked = f"is taken as a name, not as {first.partition('_')[0]} repeats"
        yield f"folder `{first}` {asked}; write data.sources with repeats to repeat it"
    if others:
        yield f"{len(others)} more folders are taken as names for their large number: {some(others)}"
