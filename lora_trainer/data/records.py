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
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from lora_trainer.config.schema import DataConfig
from lora_trainer.data.alike import clusters, is_plain, look_of
from lora_trainer.data.captions import caption_notes, captions_of
from lora_trainer.data.folders import (
    Inventory,
    few_of_a_kind,
    is_file,
    layout_notes,
    layout_problems,
    repeats_of,
    skipped_notes,
    some,
    take_stock,
)
from lora_trainer.data.images import EXTENSIONS, ImageFault, decode, frame, lost_share
from lora_trainer.errors import DataError, Problem
from lora_trainer.storage import atomic_files

BAD_IMAGE = "not a usable image"
MOST_BAD = 10
"""`data.on_bad_image: skip` leaves out one of so many images."""
MOST_ENLARGED, LONG = 4, 8
"""What is noted: an image enlarged more often, one whose sides have this ratio."""
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
    look: int = 0
    """`alike.look_of` the picture."""


class Seen(NamedTuple):
    """What is known of a picture once it was decoded."""

    sha256: str
    size: tuple[int, int]
    look: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """All records, in a fixed order, and what a user should know about them."""

    records: tuple[Record, ...]
    notes: tuple[str, ...]
    caption_files: tuple[Path, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()
    """Every other file that was found, with the reason; a folder stands for all that lies in it."""
    pictures: tuple[Path, ...] = ()
    """All that were looked at, also those that are refused or left out."""

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
    """All that can be used, without notes, what is skipped, and all that is wrong."""
    problems: list[Problem] = []
    stocks: list[tuple[Path, int, Inventory]] = []
    for folder, repeats in _sources(config):
        root = Path(folder).expanduser()
        stock = take_stock(root, config.captions.extension) if root.is_dir() else Inventory([], [], {}, [_absent(root)])
        if not stock.images and not stock.problems:
            problems.append(_no_images(root, stock.skipped))
        problems += [*stock.problems, *layout_problems(root, stock.images, config.layout)]
        stocks.append((root, repeats, stock))
    images = [(path, root, repeats) for root, repeats, stock in stocks for path in stock.images]
    checked = _read_checked(checked_file)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        looked_at = pool.map(lambda image: _look_at(image, config, checked), images)
        results = list(progress(looked_at, "checking images", len(images)))
    seen = {seen.sha256: seen for seen, _ in results if seen is not None}
    if not seen.keys() <= checked.keys():
        remembered = {digest: [*image.size, f"{image.look:016x}"] for digest, image in (checked | seen).items()}
        atomic_files.write_json(checked_file, remembered)
    left_out = _left_out([(path, result) for (path, *_), (_, result) in zip(images, results, strict=True)], config)
    if isinstance(left_out, Problem):
        problems, left_out = [*problems, left_out], {}
    for (path, *_), (_, result) in zip(images, results, strict=True):
        problems += result if isinstance(result, list) and path not in left_out else []
    records = tuple(result for _, result in results if isinstance(result, Record))
    return Dataset(records, (), *_others(stocks, left_out), tuple(path for path, *_ in images)), problems


def _sources(config: DataConfig) -> list[tuple[str, int]]:
    """Each folder of images and its repeats."""
    return [(config.dir, 1)] if config.dir is not None else [(s.dir, s.repeats) for s in config.sources or ()]


def _left_out(results: list[tuple[Path, Record | list[Problem]]], config: DataConfig) -> dict[Path, str] | Problem:
    """The images that `data.on_bad_image: skip` leaves out, and why; a problem where they are too many."""
    faults = [(path, problem) for path, wrong in results if isinstance(wrong, list) for problem in wrong]
    bad = {path: problem.why for path, problem in faults if problem.what == BAD_IMAGE}
    if config.on_bad_image == "error" or not bad:
        return {}
    if len(bad) > max(1, len(results) // MOST_BAD) or len(bad) == len(results):
        what, why = f"{len(bad)} of {len(results)} images are not usable", "skip leaves out a tenth of them at most"
        return Problem(what, "data.on_bad_image", why, "replace them or take them out")
    return {path: f"not a usable image, left out by data.on_bad_image: {why}" for path, why in bad.items()}


def _others(
    stocks: list[tuple[Path, int, Inventory]], left_out: dict[Path, str]
) -> tuple[tuple[Path, ...], tuple[tuple[Path, str], ...]]:
    """The caption files, and all that is skipped; a folder is not, where it is a source itself."""
    captions = dict.fromkeys(file for _, _, stock in stocks for file in stock.captions)
    skipped = {path: reason for _, _, stock in stocks for path, reason in stock.skipped.items()} | left_out
    if len(stocks) > 1:
        roots = {root.resolve() for root, _, _ in stocks}
        skipped = {path: reason for path, reason in skipped.items() if not (path.is_dir() and path.resolve() in roots)}
    if left_out:
        kept = {path.with_suffix("") for _, _, stock in stocks for path in stock.images if path not in left_out}
        skipped |= {file: "the caption of a picture left out" for file in captions if file.with_suffix("") not in kept}
    return tuple(file for file in captions if file not in skipped), tuple(sorted(skipped.items()))


def _absent(root: Path) -> Problem:
    what = f"the image folder {'is a file, not a folder' if root.exists() else 'does not exist'}"
    return Problem(what, str(root.absolute()), fix="mend its path; relative ones start where you are")


def _no_images(root: Path, skipped: dict[Path, str]) -> Problem:
    """That a root holds no image, and what lies there instead."""
    files = (file for file in skipped if not (file.name.startswith(".") or file.is_dir()))
    others = Counter(file.suffix.lower() or "(no ending)" for file in files)
    seen = ", ".join(f"{count} x {ending}" for ending, count in others.most_common(5)) or "nothing"
    reasons = "".join(f"; {why}" for why in dict.fromkeys(skipped.values()) if "not a kind" not in why)
    why = f"looked in it and its subfolders for {', '.join(EXTENSIONS)}; found {seen}{reasons}"
    fix = "point data.dir at the folder that holds the images"
    return Problem("no images here", str(root.absolute()), why, fix)


def _look_at(
    image: tuple[Path, Path, int], config: DataConfig, checked: dict[str, Seen]
) -> tuple[Seen | None, Record | list[Problem]]:
    """What was decoded of an image, given with its root and the root's repeats; its record or all that is wrong."""
    path, root, source_repeats = image
    relative, problems, seen = path.relative_to(root), [], None
    repeats = source_repeats * repeats_of(relative, config.layout)
    try:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if (seen := checked.get(digest)) is None:
            picture = decode(data)
            seen = Seen(digest, picture.size, look_of(picture))
    except ImageFault as fault:
        problems.append(Problem(BAD_IMAGE, str(path), str(fault), "replace the file or take it out"))
    except OSError as error:
        problems.append(Problem("the image cannot be read", str(path), error.strerror))
    if repeats < 1:
        problems.append(Problem("a folder named `0_...` asks for no repeats", str(path), fix="rename it to 1_..."))
    captions = captions_of(path, config.captions, config.layout)
    if isinstance(captions, Problem) or seen is None or problems:
        return seen, [*problems, *([captions] if isinstance(captions, Problem) else [])]
    return seen, Record(path, relative.as_posix(), seen.sha256, seen.size, repeats, captions, seen.look)


def _read_checked(file: Path) -> dict[str, Seen]:
    """By content hash what is known of the images that were decoded before; of damaged and older rows nothing."""
    try:
        rows = json.loads(file.read_text()) if is_file(file) else {}
        return {digest: Seen(digest, (row[0], row[1]), int(row[2], 16)) for digest, row in rows.items() if _is_row(row)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _is_row(row: Any) -> bool:
    if not isinstance(row, list) or [type(part) for part in row] != [int, int, str]:
        return False
    return min(row[:2]) > 0 and re.fullmatch("[0-9a-f]{16}", row[2]) is not None


def _notes(dataset: Dataset, config: DataConfig) -> Iterator[str]:
    """What a user would want to know before training: captions, repeats, crops, enlargements, copies, skipped files."""
    records, resolution = dataset.records, config.resolution
    total = len(records)
    yield from caption_notes([(r.path, r.name, r.captions) for r in records], config.captions)
    yield from layout_notes([r.name for r in records], [root for root, _ in _sources(config)], config.layout)
    lost = sorted(((lost_share(frame(r.size, resolution)), r.name) for r in records), reverse=True)
    if lost[0][0] > 0.005:
        worst = ", ".join(f"{name} {share:.0%}" for share, name in lost[:3] if share > 0.005)
        mean = sum(share for share, _ in lost) / total
        yield f"cropping to a square loses {mean:.0%} of the picture on average; most: {worst}"
    if long := [r.name for r in records if max(r.size) >= LONG * min(r.size)]:
        yield f"{len(long)} images are strips, {LONG} times as long as wide, of which little is seen: {some(long)}"
    if small := [r.name for r in records if min(r.size) < resolution]:
        yield f"{len(small)} of {total} images are smaller than {resolution} px and are enlarged: {some(small)}"
    if tiny := [r.name for r in records if min(r.size) * MOST_ENLARGED < resolution]:
        yield f"{len(tiny)} of these more than {MOST_ENLARGED} times, which blurs all that is learned: {some(tiny)}"
    yield from _copies(dataset, config)
    yield from skipped_notes(dataset.skipped)


def _copies(dataset: Dataset, config: DataConfig) -> Iterator[str]:
    """Images that are found twice, that are equal, and that look nearly alike."""
    records = dataset.records
    if len(_sources(config)) > 1:
        once = {record.path.resolve(): record for record in records}
        if twice := _repeated(records, [record.path.resolve() for record in records]):
            yield f"one source lies in the other, so that these count in both: {some(list(dict.fromkeys(twice)))}"
        records = tuple(once.values())
    if twins := _repeated(records, [r.sha256 for r in records]):
        yield f"{len(twins)} files have the same content as another: {some(twins)}"
    if shared := _repeated(records, [r.path.with_suffix("") for r in records]):
        yield f"{len(shared)} files share one caption, as only their endings differ: {some(shared)}"
    names = {record.sha256: record.name for record in records}
    groups = [group for group in clusters({r.sha256: r.look for r in records}) if len(group) > 1]
    if groups:
        listed = [some([names[digest] for digest in group]) for group in groups]
        num = sum(map(len, groups))
        yield f"{num} images look nearly alike in gray, and are held out together or not at all: {some(listed, ' | ')}"
    if plain := list(dict.fromkeys(r.name for r in records if is_plain(r.look))):
        yield f"{len(plain)} images are too plain to find near-copies of: {some(plain)}"


def _repeated(records: Iterable[Record], keys: list) -> list[str]:
    """Names of the records whose key others have too."""
    counts = Counter(keys)
    return [record.name for record, key in zip(records, keys, strict=True) if counts[key] > 1]
