"""Find the images and captions, check every one, and report all that is wrong before any model loads."""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from lora_trainer.config.schema import DataConfig
from lora_trainer.data.captions import caption_file, caption_from_name, read_lines
from lora_trainer.data.images import EXTENSIONS, Framing, ImageFault, decode, frame
from lora_trainer.errors import DataError, Problem
from lora_trainer.storage import atomic_files

_REPEATS_FOLDER = re.compile(r"(\d+)_.*")
MAX_FOLDER_REPEATS = 100
"""The largest N that a folder `N_name` asks for; a larger number is part of a name: a year, a date, a size."""
Progress = Callable[[Iterable, str, int], Iterable]  # (items, what is done, how many) -> the same items


@dataclass(frozen=True, slots=True)
class Record:
    """One image file with its captions; `name` is its path inside the dataset."""

    path: Path
    name: str
    sha256: str
    size: tuple[int, int]
    repeats: int
    captions: tuple[str, ...]

    def framing(self, resolution: int, place: tuple[float, float] = (0.5, 0.5)) -> Framing:
        return frame(self.size, resolution, place)


@dataclass(frozen=True, slots=True)
class Dataset:
    """All records, in a fixed order, and what a user should know about them."""

    records: tuple[Record, ...]
    notes: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """Images x repeats."""
        return sum(record.repeats for record in self.records)

    def digest(self) -> str:
        """Identity of the content: image bytes, captions and repeats; names and places do not count."""
        return content_digest(self.records)

    def samples(self) -> Samples:
        """The record index of each sample of an epoch, before shuffling."""
        return Samples(tuple(accumulate(record.repeats for record in self.records)))


@dataclass(frozen=True, slots=True)
class Samples:
    """Record 0 as often as it is repeated, then record 1 ...; takes memory per record, not per sample."""

    ends: tuple[int, ...]
    """Number of samples up to each record, its own included."""

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, sample: int) -> int:
        """The record's index."""
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        return bisect_right(self.ends, sample)


def content_digest(records: Iterable[Record]) -> str:
    """One hash of image bytes, captions and repeats, in whatever order."""
    rows = sorted((record.sha256, record.repeats, record.captions) for record in records)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def order_digest(records: Iterable[Record]) -> str:
    """One hash of the images in their order, which decides what each slot draws."""
    return hashlib.sha256(json.dumps([record.sha256 for record in records]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    name: str
    repeats: int


def discover(config: DataConfig, checked_file: Path, progress: Progress) -> Dataset:
    """Find, hash and fully decode every image and read every caption.

    Args:
        checked_file: remembers by content which images have been decoded before, so that a resume is quick.

    Raises:
        DataError: with every missing folder, broken image and unusable caption.
    """
    found = [image for root, repeats in _roots(config) for image in _walk(root, repeats)]
    checked = _read_checked(checked_file)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        looked_at = pool.map(lambda image: _look_at(image, config, checked), found)
        results = list(progress(looked_at, "checking images", len(found)))
    problems = [problem for result in results if isinstance(result, list) for problem in result]
    if problems:
        raise DataError(*problems)
    records = tuple(result for result in results if isinstance(result, Record))
    _write_checked(checked_file, checked, records)
    return Dataset(records, tuple(_notes(records, config)))


def _roots(config: DataConfig) -> list[tuple[Path, int]]:
    if config.dir is not None:
        return [(_existing(config.dir), 1)]
    assert config.sources is not None
    return [(_existing(source.dir), source.repeats) for source in config.sources]


def _existing(folder: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(
            Problem(
                f"the image folder {what}", str(path.absolute()), fix="set data.dir; relative paths start where you are"
            )
        )
    return path


def _walk(root: Path, source_repeats: int) -> Iterator[_Found]:
    """The images under a root, sorted by name; hidden folders are left out, links out of the root are refused."""
    real_root = root.resolve()
    images: list[_Found] = []
    others: Counter[str] = Counter()
    for folder, subfolders, files in os.walk(root, followlinks=False):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in sorted(files):
            path = Path(folder) / file
            if file.startswith("."):
                continue
            if path.suffix.lower() not in EXTENSIONS:
                others[path.suffix.lower() or "(no ending)"] += 1
                continue
            if not path.resolve().is_relative_to(real_root):
                raise DataError(
                    Problem(
                        "the image is a link out of its folder",
                        str(path),
                        fix="copy it in, or add its folder as a source",
                    )
                )
            name = path.relative_to(root).as_posix()
            images.append(_Found(path, name, source_repeats * _folder_repeats(path.relative_to(root))))
    if not images:
        seen = ", ".join(f"{count} x {ending}" for ending, count in others.most_common(5)) or "nothing"
        raise DataError(
            Problem(
                "no images here",
                str(root.absolute()),
                f"looked in it and its subfolders for {', '.join(EXTENSIONS)}; found {seen}",
                "point data.dir at the folder that holds the images",
            )
        )
    yield from sorted(images, key=lambda image: image.name)


def _folder_repeats(relative: Path) -> int:
    """N of the nearest folder `N_name` around the image that asks for repeats; 1 without one."""
    asked = (_number_before(part) for part in reversed(relative.parts[:-1]))
    return next((number for number in asked if number is not None and number <= MAX_FOLDER_REPEATS), 1)


def _number_before(folder: str) -> int | None:
    """N of a folder that is named `N_name`."""
    match = _REPEATS_FOLDER.fullmatch(folder)
    return int(match[1]) if match else None


def _look_at(image: _Found, config: DataConfig, checked: dict[str, tuple[int, int]]) -> Record | list[Problem]:
    problems: list[Problem] = []
    digest, size = "", (0, 0)
    try:
        data = image.path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        size = checked.get(digest) or decode(data).size
    except ImageFault as fault:
        problems.append(Problem("not a usable image", str(image.path), str(fault), "replace the file or take it out"))
    except OSError as error:
        problems.append(Problem("the image cannot be read", str(image.path), error.strerror))
    if image.repeats < 1:
        problems.append(
            Problem("a folder named `0_...` asks for no repeats", str(image.path), fix="rename it to 1_...")
        )
    captions = _captions(image.path, config)
    if isinstance(captions, Problem):
        problems.append(captions)
    if problems or isinstance(captions, Problem):
        return problems
    return Record(image.path, image.name, digest, size, image.repeats, captions)


def _captions(image: Path, config: DataConfig) -> tuple[str, ...] | Problem:
    file = caption_file(image, config.captions.extension)
    lines = read_lines(file) if file.is_file() else ()
    if isinstance(lines, Problem):
        return lines
    if lines:
        return lines if config.captions.lines == "all" else lines[:1]
    if config.captions.missing == "filename":
        return (caption_from_name(image),)
    if config.captions.missing == "empty":
        return ("",)
    what = "the caption file is empty" if file.is_file() else "the image has no caption"
    return Problem(
        what,
        str(image),
        f"looked for {file.name}{_other_caption(image, config.captions.extension)}",
        "write it, or set data.captions.missing to filename or empty",
    )


def _other_caption(image: Path, extension: str) -> str:
    """A hint where a caption lies beside the image under another usual ending."""
    for other in (".txt", ".caption"):
        if other != extension and image.with_suffix(other).is_file():
            return f"; {image.with_suffix(other).name} is there: set data.captions.extension: {other}"
    return ""


def _read_checked(file: Path) -> dict[str, tuple[int, int]]:
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {digest: (width, height) for digest, (width, height) in rows.items()}


def _write_checked(file: Path, before: dict[str, tuple[int, int]], records: Iterable[Record]) -> None:
    now = before | {record.sha256: record.size for record in records}
    if now != before:
        atomic_files.write_json(file, {digest: list(size) for digest, size in now.items()})


def _notes(records: tuple[Record, ...], config: DataConfig) -> Iterator[str]:
    """Caption coverage, crops and enlargements: what a user would want to know before training."""
    total = len(records)
    captioned = sum(caption_file(r.path, config.captions.extension).is_file() for r in records)
    rest = "" if captioned == total else f"; {total - captioned} by policy `{config.captions.missing}`"
    yield f"captions: {captioned} of {total} from {config.captions.extension} files{rest}"
    yield from _numbered_names(records)
    lost = sorted(((r.framing(config.resolution).lost_share, r.name) for r in records), reverse=True)
    if lost[0][0] > 0.005:
        worst = ", ".join(f"{name} {share:.0%}" for share, name in lost[:3] if share > 0.005)
        mean = sum(share for share, _ in lost) / total
        yield f"cropping to a square loses {mean:.0%} of the picture on average; most: {worst}"
    small = [r.name for r in records if r.framing(config.resolution).upscale > 1]
    if small:
        yield f"{len(small)} of {total} images are smaller than {config.resolution} px and are enlarged: {_some(small)}"
    contents = Counter(record.sha256 for record in records)
    twins = [r.name for r in records if contents[r.sha256] > 1]
    if twins:
        yield f"{len(twins)} files have the same content as another: {_some(twins)}"
    stems = Counter(r.path.with_suffix("") for r in records)
    shared = [r.name for r in records if stems[r.path.with_suffix("")] > 1]
    if shared:
        yield f"{len(shared)} files share one caption, as only their endings differ: {_some(shared)}"


def _numbered_names(records: tuple[Record, ...]) -> Iterator[str]:
    """Folders named `N_name` whose N is no number of repeats."""
    folders = sorted({folder for record in records for folder in Path(record.name).parts[:-1]})
    first, *others = [folder for folder in folders if (_number_before(folder) or 0) > MAX_FOLDER_REPEATS] or [""]
    if first:
        asked = f"is taken as a name, not as {_number_before(first)} repeats"
        yield f"folder `{first}` {asked}; write data.sources with repeats to repeat it"
    if others:
        yield f"{len(others)} more folders are taken as names for their large number: {_some(others)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
