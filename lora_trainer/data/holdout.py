"""Which images are held out for validation, and which of the others are watched. Never imports torch.

Images are chosen by a hash of their content, so that adding files to the folder moves none of them in or out.
Near-copies stay on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_trainer.data.alike import clusters
from lora_trainer.data.folders import few_of_a_kind, some
from lora_trainer.data.records import Dataset, Record
from lora_trainer.errors import DataError, Problem
from lora_trainer.tracking.metrics import HELD_OUT, PRIOR, TRAIN

MIN_ITEMS = 2


@dataclass(frozen=True, slots=True)
class Split:
    """What is trained on, what is not, and the probes' images by the probe's name."""

    training: Dataset
    held_out: tuple[Record, ...] = ()
    probes: Mapping[str, tuple[Record, ...]] = field(default_factory=dict)
    """A part of each set, as large as the cost cap allows."""


def split_by_fraction(dataset: Dataset, fraction: float, seed: int, chosen_before: Sequence[str] | None) -> Split:
    """Hold out a share of the images, at least two: whole images with all repeats, and with them what looks alike.

    Of each cluster one content decides for all; a cluster of more than half the images is never held out.

    Args:
        chosen_before: content hashes that an earlier start of this run chose; they are kept.

    Raises:
        DataError: too few images are left to train on.
    """
    groups = clusters({record.sha256: record.look for record in dataset.records})
    chosen = set(chosen_before or _choose(groups, fraction, seed))
    training = tuple(record for record in dataset.records if record.sha256 not in chosen)
    if not training or len(chosen) < MIN_ITEMS:
        num, contents = len(dataset.records), sum(map(len, groups))
        what = f"holding out {MIN_ITEMS} images leaves none of {num} to train on"
        why = f"only {contents} of them differ in content" if contents < num else None
        if alike := sum(len(group) for group in groups if len(group) > 1):
            why = f"{alike} of them look nearly alike, and what looks alike is held out together"
        why = "they are equal" if contents == 1 < num else why
        fix = "add images, give others as validation.dir, or write validation: null"
        raise DataError(Problem(what, "validation.fraction", why, fix))
    held_out = _once(record for record in dataset.records if record.sha256 in chosen)
    near = _near(training, held_out) if chosen_before else ()
    notes = [f"validation: {len(held_out)} of {len(dataset.records)} images are held out", *near]
    return Split(replace(dataset, records=training, notes=(*dataset.notes, *notes)), held_out)


def _choose(groups: list[list[str]], fraction: float, seed: int) -> list[str]:
    """The contents whose groups rank below the share; the least groups where those are too few or all."""
    num = sum(map(len, groups))
    ranked = sorted((_rank(min(group), seed), group) for group in groups if 2 * len(group) <= max(num, 2))
    below = [content for rank, group in ranked if rank < fraction for content in group]
    least: list[str] = []
    for _, group in ranked:
        least += group if len(least) < MIN_ITEMS else []
    return below if MIN_ITEMS <= len(below) < num else least


def _near(trained: Iterable[Record], held_out: Iterable[Record]) -> Iterator[str]:
    """That some held-out images look nearly like trained ones."""
    outside = {record.sha256: record for record in held_out}
    looks = {record.sha256: record.look for record in (*trained, *outside.values())}
    mixed = [group for group in clusters(looks) if 0 < len(outside.keys() & group) < len(group)]
    if near := [outside[content].name for group in mixed for content in group if content in outside]:
        yield f"validation: {len(near)} held-out images look nearly like trained ones: {some(near)}"


def split_by_folder(dataset: Dataset, held_out: Dataset) -> Split:
    """Validate on another folder's images.

    Raises:
        DataError: an image is in both, or the folder has fewer than two.
    """
    trained = {record.sha256: record for record in dataset.records}
    problems = [
        Problem(
            "a validation image is trained on too",
            str(record.path),
            f"it equals {trained[record.sha256].path}",
            "take it out of one of the folders",
        )
        for record in held_out.records
        if record.sha256 in trained
    ]
    if len(held_out.records) < MIN_ITEMS:
        problems.append(Problem(f"a probe needs {MIN_ITEMS} images at least", "validation.dir", fix="add images"))
    if problems:
        raise DataError(*few_of_a_kind(problems))
    near = _near(dataset.records, held_out.records)
    return Split(replace(dataset, notes=(*dataset.notes, *near)), _once(held_out.records))


def with_watched(split: Split, prior: Dataset | None, num_items: int, seed: int) -> Split:
    """The same split with at most `num_items` per probe: held-out ones, as many trained ones, and prior ones."""
    probes = {HELD_OUT: split.held_out, TRAIN: _once(split.training.records)}
    if prior is not None:
        probes[PRIOR] = _once(prior.records)
    limit = min(num_items, len(split.held_out))
    for name, records in probes.items():
        probes[name] = tuple(sorted(records, key=lambda record: _rank(record.sha256, seed))[:limit])
    return replace(split, probes=probes)


def _once(records: Iterable[Record]) -> tuple[Record, ...]:
    """One record per content, in order."""
    by_content: dict[str, Record] = {}
    for record in records:
        by_content.setdefault(record.sha256, record)
    return tuple(by_content.values())


def _rank(digest: str, seed: int) -> float:
    """A number in [0, 1) that belongs to the content."""
    mixed = hashlib.sha256(f"{seed}:{digest}".encode()).digest()
    return int.from_bytes(mixed[:8], "big") / 2**64
