"""Find the images and captions, check every one, and report all that is wrong before any model loads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from lora_trainer.config.schema import CaptionConfig, DataConfig
from lora_trainer.data.folders import CAPTION_ENDINGS, few_of_a_kind, is_file, skipped_notes, some, take_stock
from lora_trainer.data.images import EXTENSIONS, ImageFault, decode, frame, lost_share
from lora_trainer.errors import DataError, Problem, remedy_of_absence
from lora_trainer.models.family import Family
from lora_trainer.storage import atomic_files

_REPEATS_FOLDER = re.compile(r"(\d+)_.*")
MAX_FOLDER_REPEATS = 100
"""The largest N that a folder `N_name` asks for; a larger number is part of a name: a year, a date, a size."""
MAX_CAPTION_BYTES = 100_000
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


@dataclass(frozen=True, slots=True)
class Dataset:
    """All records, in a fixed order, and what a user should know about them."""

    records: tuple[Record, ...]
    notes: tuple[str, ...]
    caption_files: tuple[Path, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()
    """Every other file that was found, with the reason; a folder stands for all that lies in it."""

    @property
    def num_samples(self) -> int:
        """Images x repeats."""
        return sum(record.repeats for record in self.records)

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
    """One hash of image bytes, captions and repeats, in whatever order; names and places do not count."""
    rows = sorted((record.sha256, record.repeats, record.captions) for record in records)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def order_digest(records: Iterable[Record]) -> str:
    """One hash of the images in their order, which decides what each slot draws."""
    return hashlib.sha256(json.dumps([record.sha256 for record in records]).encode()).hexdigest()


def discover(config: DataConfig, checked_file: Path, progress: Progress) -> Dataset:
    """Find, hash and fully decode every image and read every caption.

    Args:
        checked_file: remembers by content which images have been decoded before, so that a resume is quick.

    Raises:
        DataError: with every missing folder, broken image and unusable caption.
    """
    dataset, problems = survey(config, checked_file, progress)
    if problems:
        raise DataError(*few_of_a_kind(problems))
    return replace(dataset, notes=tuple(_notes(dataset, config)))


def survey(config: DataConfig, checked_file: Path, progress: Progress) -> tuple[Dataset, list[Problem]]:
    """All that can be used, without notes, what is skipped, and all that is wrong.

    Raises:
        DataError: a folder is missing or holds no image.
    """
    sources = [(config.dir, 1)] if config.dir is not None else [(s.dir, s.repeats) for s in config.sources or ()]
    roots = [(_existing(folder), repeats) for folder, repeats in sources]
    stocks = [(root, repeats, take_stock(root, config.captions.extension)) for root, repeats in roots]
    problems = [problem for _, _, stock in stocks for problem in stock.problems]
    empty = [_no_images(root, stock.skipped) for root, _, stock in stocks if not stock.images and not stock.problems]
    if empty:
        raise DataError(*problems, *empty)
    images = [(path, root, repeats) for root, repeats, stock in stocks for path in stock.images]
    checked = _read_checked(checked_file)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        looked_at = pool.map(lambda image: _look_at(image, config.captions, checked), images)
        results = list(progress(looked_at, "checking images", len(images)))
    problems += [problem for result in results if isinstance(result, list) for problem in result]
    records = tuple(result for result in results if isinstance(result, Record))
    sizes = {record.sha256: record.size for record in records}
    if not sizes.items() <= checked.items():
        atomic_files.write_json(checked_file, checked | sizes)
    captions = tuple(file for _, _, stock in stocks for file in stock.captions)
    skipped = tuple(sorted(item for _, _, stock in stocks for item in stock.skipped.items()))
    return Dataset(records, (), captions, skipped), problems


def _existing(folder: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = f"the image folder {'is a file, not a folder' if path.exists() else 'does not exist'}"
        raise DataError(Problem(what, str(path.absolute()), fix=remedy_of_absence(folder, "data.dir")))
    return path


def _no_images(root: Path, skipped: dict[Path, str]) -> Problem:
    """That a root holds no image, and what lies there instead."""
    others = Counter(file.suffix.lower() or "(no ending)" for file in skipped if not file.name.startswith("."))
    seen = ", ".join(f"{count} x {ending}" for ending, count in others.most_common(5)) or "nothing"
    reasons = "".join(f"; {why}" for why in dict.fromkeys(skipped.values()) if "not a kind" not in why)
    why = f"looked in it and its subfolders for {', '.join(EXTENSIONS)}; found {seen}{reasons}"
    fix = "point data.dir at the folder that holds the images"
    return Problem("no images here", str(root.absolute()), why, fix)


def _folder_repeats(relative: Path) -> int:
    """N of the nearest folder `N_name` around the image that asks for repeats; 1 without one."""
    asked = (_number_before(part) for part in reversed(relative.parts[:-1]))
    return next((number for number in asked if number is not None and number <= MAX_FOLDER_REPEATS), 1)


def _number_before(folder: str) -> int | None:
    """N of a folder that is named `N_name`."""
    match = _REPEATS_FOLDER.fullmatch(folder)
    return int(match[1]) if match else None


def _look_at(
    image: tuple[Path, Path, int], config: CaptionConfig, checked: dict[str, tuple[int, int]]
) -> Record | list[Problem]:
    """The record of an image, given with its root and the root's repeats, or all that is wrong with it."""
    path, root, source_repeats = image
    relative, problems = path.relative_to(root), []
    repeats = source_repeats * _folder_repeats(relative)
    try:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        size = checked.get(digest) or decode(data).size
    except ImageFault as fault:
        problems.append(Problem("not a usable image", str(path), str(fault), "replace the file or take it out"))
    except OSError as error:
        problems.append(Problem("the image cannot be read", str(path), error.strerror))
    if repeats < 1:
        problems.append(Problem("a folder named `0_...` asks for no repeats", str(path), fix="rename it to 1_..."))
    captions = _captions(path, config)
    if isinstance(captions, Problem):
        return [*problems, captions]
    return problems or Record(path, relative.as_posix(), digest, size, repeats, captions)


def _captions(image: Path, config: CaptionConfig) -> tuple[str, ...] | Problem:
    file = image.with_suffix(config.extension)
    there = is_file(file)
    lines = _caption_lines(file) if there else ()
    if isinstance(lines, Problem):
        return lines
    if lines:
        return lines if config.lines == "all" else lines[:1]
    if config.missing == "filename":
        return (_caption_from_name(image),)
    if config.missing == "empty":
        return ("",)
    what = "the caption file is empty" if there else "the image has no caption"
    usual = (image.with_suffix(ending) for ending in CAPTION_ENDINGS if ending != config.extension)
    other = next((f"; {o.name} is there: set data.captions.extension: {o.suffix}" for o in usual if is_file(o)), "")
    fix = "write it, or set data.captions.missing to filename or empty"
    return Problem(what, str(image), f"looked for {file.name}{other}", fix)


def _caption_lines(file: Path) -> tuple[str, ...] | Problem:
    """The non-empty lines of a caption file, trimmed; a problem where it cannot be read as UTF-8 text."""
    try:
        size = file.stat().st_size
        raw = file.read_bytes() if size <= MAX_CAPTION_BYTES else b""
    except OSError as error:
        return Problem("the caption cannot be read", str(file), error.strerror, "check the file's permissions")
    if size > MAX_CAPTION_BYTES:
        return Problem(f"a caption of {size:,} bytes", str(file), fix="shorten it: is this really a caption?")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Problem("the caption is UTF-16", str(file), fix=_as_utf8("UTF-16", file))
    if b"\0" in raw:
        return Problem("the caption holds NUL bytes", str(file), f"byte {raw.index(0)}", "save it as plain UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is 0x{raw[error.start]:02x}"
        return Problem("the caption is not UTF-8", str(file), why, _as_utf8("WINDOWS-1252", file))
    return tuple(line.strip() for line in re.split(r"[\r\n]+", text) if line.strip())


def _caption_from_name(image: Path) -> str:
    """The words of a folder `N_words`, as in kohya; else of the file's name, of its folder's if that is a number."""
    words, folder, repeats = _words(image.stem), image.parent.name, _number_before(image.parent.name)
    if words.isdigit() or (repeats is not None and repeats <= MAX_FOLDER_REPEATS):
        return _words(re.sub(r"^\d+_", "", folder)) or words
    return words


def _words(name: str) -> str:
    """Separators become spaces; a trailing number such as ` 12` or ` (2)` goes."""
    words = re.sub(r"[\s_\-]+", " ", name).strip()
    return re.sub(r"\s*\(?\d+\)?$", "", words).strip() or words


def _read_checked(file: Path) -> dict[str, tuple[int, int]]:
    """Size by content hash of the images that were decoded before; empty where the file cannot be read."""
    try:
        rows = atomic_files.read_json(file, 2**26) if is_file(file) else {}
        sizes = {digest: (width, height) for digest, (width, height) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    usable = all(isinstance(side, int) and side > 0 for size in sizes.values() for side in size)
    return sizes if usable else {}


def _notes(dataset: Dataset, config: DataConfig) -> Iterator[str]:
    """Caption coverage, crops and enlargements: what a user would want to know before training."""
    records = dataset.records
    total, resolution, extension = len(records), config.resolution, config.captions.extension
    captioned = sum(is_file(r.path.with_suffix(extension)) for r in records)
    rest = "" if captioned == total else f"; {total - captioned} by policy `{config.captions.missing}`"
    yield f"captions: {captioned} of {total} from {extension} files{rest}"
    yield from _caption_notes(records, config.captions)
    yield from _numbered_names(records)
    lost = sorted(((lost_share(frame(r.size, resolution)), r.name) for r in records), reverse=True)
    if lost[0][0] > 0.005:
        worst = ", ".join(f"{name} {share:.0%}" for share, name in lost[:3] if share > 0.005)
        mean = sum(share for share, _ in lost) / total
        yield f"cropping to a square loses {mean:.0%} of the picture on average; most: {worst}"
    if small := [r.name for r in records if min(r.size) < resolution]:
        yield f"{len(small)} of {total} images are smaller than {resolution} px and are enlarged: {some(small)}"
    if twins := _repeated(records, [r.sha256 for r in records]):
        yield f"{len(twins)} files have the same content as another: {some(twins)}"
    if shared := _repeated(records, [r.path.with_suffix("") for r in records]):
        yield f"{len(shared)} files share one caption, as only their endings differ: {some(shared)}"
    yield from skipped_notes(dataset.skipped)


def _caption_notes(records: tuple[Record, ...], config: CaptionConfig) -> Iterator[str]:
    """What names were made into, and what of the files is not read."""
    files = [(record, record.path.with_suffix(config.extension)) for record in records]
    if config.missing == "filename":
        made = [f"{record.name} `{record.captions[0]}`" for record, file in files if not is_file(file)]
        if made:
            yield f"captions from names: {some(made)}"
    if config.lines == "first":
        lines = ((record.name, _caption_lines(file)) for record, file in files if is_file(file))
        if longer := [name for name, read in lines if isinstance(read, tuple) and len(read) > 1]:
            rest = "of which only the first is used; data.captions.lines: all takes each as a variant"
            yield f"{len(longer)} captions have several lines, {rest}: {some(longer)}"


def _as_utf8(encoding: str, file: Path) -> str:
    """What a shell does with a caption in another encoding."""
    old, new = shlex.quote(str(file)), shlex.quote(f"{file}.utf-8")
    return f"save it as UTF-8, as by: iconv -f {encoding} -t UTF-8 {old} > {new} && mv {new} {old}"


def long_captions(family: Family, records: Iterable[Record]) -> list[Problem]:
    """The captions that are longer than the text encoder reads."""
    limit, fix = family.max_tokens, "shorten it, or set data.captions.too_long: cut"
    counts = ((record, family.count_tokens(caption)) for record in records for caption in record.captions)
    return [
        Problem(f"the caption has {n - 2} tokens, the text encoder reads {limit - 2}", str(record.path), fix=fix)
        for record, n in counts
        if n > limit
    ]


def _repeated(records: Iterable[Record], keys: list) -> list[str]:
    """Names of the records whose key others have too."""
    counts = Counter(keys)
    return [record.name for record, key in zip(records, keys, strict=True) if counts[key] > 1]


def _numbered_names(records: tuple[Record, ...]) -> Iterator[str]:
    """Folders named `N_name` whose N is no number of repeats."""
    folders = sorted({folder for record in records for folder in Path(record.name).parts[:-1]})
    first, *others = [folder for folder in folders if (_number_before(folder) or 0) > MAX_FOLDER_REPEATS] or [""]
    if first:
        asked = f"is taken as a name, not as {_number_before(first)} repeats"
        yield f"folder `{first}` {asked}; write data.sources with repeats to repeat it"
    if others:
        yield f"{len(others)} more folders are taken as names for their large number: {some(others)}"
