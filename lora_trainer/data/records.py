"""Find the images and captions, check every one, and report all that is wrong before any model loads."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from lora_trainer.config.schema import DataConfig
from lora_trainer.data.alike import clusters, is_plain, look_of
from lora_trainer.data.captions import caption_notes, captions_of
from lora_trainer.data.folders import (
    BAD_IMAGE,
    EXTENSIONS,
    MEND_IMAGE,
    Inventory,
    few_of_a_kind,
    is_file,
    is_folder,
    layout_notes,
    layout_problems,
    repeats_of,
    skipped_notes,
    some,
    take_stock,
)
from lora_trainer.data.images import ImageFault, decode, frame, lost_share
from lora_trainer.errors import DataError, Problem, SystemSetupError, remedy_of_absence
from lora_trainer.storage import atomic_files

MAX_IMAGE_BYTES = 2**29
MOST_BAD = 10
"""`data.on_bad_image: skip` leaves out one of so many images."""
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


class _Look(NamedTuple):
    """What came of looking at an image: its record, or all that is wrong with it."""

    path: Path
    seen: Seen | None
    record: Record | None
    problems: list[Problem]


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
        stock = (
            take_stock(root, config.captions.extension)
            if is_folder(root)
            else Inventory(problems=[_absent(root, folder)])
        )
        if not stock.images and not stock.problems:
            problems.append(_no_images(root, stock.skipped))
        problems += [*stock.problems, *layout_problems(root, stock.images, config.layout)]
        stocks.append((root, repeats, stock))
    images = [(path, root, repeats) for root, repeats, stock in stocks for path in stock.images]
    checked = _read_checked(checked_file)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        looked_at = pool.map(lambda image: _look_at(image, config, checked), images)
        looks = list(progress(looked_at, "checking images", len(images)))
    seen = {look.seen.sha256: look.seen for look in looks if look.seen is not None}
    if not seen.keys() <= checked.keys():
        remembered = {digest: [*image.size, f"{image.look:016x}"] for digest, image in (checked | seen).items()}
        with suppress(OSError, SystemSetupError):  # it is looked at again next time
            atomic_files.write_json(checked_file, remembered)
    left_out, too_many = _left_out(looks, config.on_bad_image)
    problems += [*too_many, *(fault for look in looks if look.path not in left_out for fault in look.problems)]
    records = tuple(look.record for look in looks if look.record is not None)
    return Dataset(records, (), *_others(stocks, left_out), tuple(look.path for look in looks)), problems


def _sources(config: DataConfig) -> list[tuple[str, int]]:
    """Each folder of images and its repeats."""
    return [(config.dir, 1)] if config.dir is not None else [(s.dir, s.repeats) for s in config.sources or ()]


def _left_out(looks: list[_Look], policy: str) -> tuple[dict[Path, str], list[Problem]]:
    """The images that `data.on_bad_image: skip` leaves out, and why; a problem where they are too many."""
    bad = {look.path: fault.why for look in looks for fault in look.problems if fault.what == BAD_IMAGE}
    if policy == "error" or not bad:
        return {}, []
    if len(bad) > max(1, len(looks) // MOST_BAD) or len(bad) == len(looks):
        what, why = (
            f"{len(bad)} of {len(looks)} images are not usable",
            "skip leaves out a tenth of them at most, or one",
        )
        return {}, [Problem(what, "data.on_bad_image", why, "replace them or take them out")]
    return {path: f"not a usable image, left out by data.on_bad_image: {why}" for path, why in bad.items()}, []


def _others(
    stocks: list[tuple[Path, int, Inventory]], left_out: dict[Path, str]
) -> tuple[tuple[Path, ...], tuple[tuple[Path, str], ...]]:
    """The caption files, and all that is skipped; a folder is not, where it is a source itself."""
    captions = dict.fromkeys(file for _, _, stock in stocks for file in stock.captions)
    skipped = {path: reason for _, _, stock in stocks for path, reason in stock.skipped.items()} | left_out
    if len(stocks) > 1:
        roots = {root.resolve() for root, _, _ in stocks}
        skipped = {
            path: reason for path, reason in skipped.items() if not (is_folder(path) and path.resolve() in roots)
        }
    if left_out:
        kept = {path.with_suffix("") for _, _, stock in stocks for path in stock.images if path not in left_out}
        skipped |= {file: "the caption of a picture left out" for file in captions if file.with_suffix("") not in kept}
    return tuple(file for file in captions if file not in skipped), tuple(sorted(skipped.items()))


def _absent(root: Path, written: str) -> Problem:
    what = f"the image folder {'is a file, not a folder' if os.path.lexists(root) else 'does not exist'}"
    return Problem(what, str(root.absolute()), fix=remedy_of_absence(written, "data.dir"))


def _no_images(root: Path, skipped: dict[Path, str]) -> Problem:
    """That a root holds no image, and what lies there instead."""
    files = (file for file in skipped if not (file.name.startswith(".") or is_folder(file)))
    others = Counter(file.suffix.lower() or "(no ending)" for file in files)
    seen = ", ".join(f"{count} x {ending}" for ending, count in others.most_common(5)) or "nothing"
    reasons = "".join(f"; {why}" for why in dict.fromkeys(skipped.values()) if "not a kind" not in why)
    why = f"looked in it and its subfolders for {', '.join(EXTENSIONS)}; found {seen}{reasons}"
    fix = "point data.dir at the folder that holds the images"
    return Problem("no images here", str(root.absolute()), why, fix)


def _look_at(image: tuple[Path, Path, int], config: DataConfig, checked: dict[str, Seen]) -> _Look:
    """Look at an image, given with its root and the root's repeats."""
    path, root, source_repeats = image
    relative, problems, seen = path.relative_to(root), [], None
    repeats = source_repeats * repeats_of(relative, config.layout)
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise ImageFault(f"the file is larger than {MAX_IMAGE_BYTES:,} bytes")
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if (seen := checked.get(digest)) is None:
            picture = decode(data)
            seen = Seen(digest, picture.size, look_of(picture))
    except ImageFault as fault:
        problems.append(Problem(BAD_IMAGE, str(path), str(fault), MEND_IMAGE))
    except OSError as error:
        problems.append(Problem("the image cannot be read", str(path), error.strerror, "check its permissions"))
    if repeats < 1:
        problems.append(Problem("a folder named `0_...` asks for no repeats", str(path), fix="rename it to 1_..."))
    captions = captions_of(path, config.captions, config.layout)
    if isinstance(captions, Problem):
        problems.append(captions)
    elif seen is not None and not problems:
        record = Record(path, relative.as_posix(), seen.sha256, seen.size, repeats, captions, seen.look)
        return _Look(path, seen, record, [])
    return _Look(path, seen, None, problems)


def _read_checked(file: Path) -> dict[str, Seen]:
    """By content hash what is known of the images that were decoded before; nothing where a row is of another kind."""
    try:
        rows = atomic_files.read_json(file, 2**26) if is_file(file) else {}
        seen = {digest: Seen(digest, (width, height), int(look, 16)) for digest, (width, height, look) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    sides = (side for one in seen.values() for side in one.size)
    usable = all(isinstance(side, int) and side > 0 for side in sides)
    return seen if usable and all(0 <= one.look < 2**64 for one in seen.values()) else {}


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
    if small := sorted((min(r.size), r.name) for r in records if min(r.size) < resolution):
        most = f"up to {resolution / small[0][0]:.1f} times: {some([name for _, name in small])}"
        yield f"{len(small)} of {total} images are smaller than {resolution} px and are enlarged, {most}"
    yield from _copies(dataset, config)
    yield from skipped_notes(dataset.skipped)


def _copies(dataset: Dataset, config: DataConfig) -> Iterator[str]:
    """Images that are found twice, that are equal, and that look nearly alike."""
    records = dataset.records
    if len(_sources(config)) > 1:
        once = {record.path.absolute(): record for record in records}
        if twice := _repeated(records, [record.path.absolute() for record in records]):
            yield f"one source lies in the other, so that these count in both: {some(twice)}"
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
    if plain := [record.name for record in records if is_plain(record.look)]:
        yield f"{len(plain)} images are too plain to find near-copies of: {some(plain)}"


def _repeated(records: Iterable[Record], keys: list) -> list[str]:
    """Names of the records whose key others have too."""
    counts = Counter(keys)
    return [record.name for record, key in zip(records, keys, strict=True) if counts[key] > 1]
