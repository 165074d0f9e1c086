"""Which images are held out for validation, and which of the others are watched. Never imports torch.

Images are chosen by a hash of their content, so that adding files to the folder moves none of them in or out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
    """Hold out the share of images whose content hash is smallest; at least two, whole images with all repeats.

    Args:
        chosen_before: content hashes that an earlier start of this run chose; they are kept.

    Raises:
        DataError: too few images are left to train on.
    """
    ranks = {record.sha256: _rank(record.sha256, seed) for record in dataset.records}
    below = [digest for digest, rank in ranks.items() if rank < fraction]
    least = sorted(ranks, key=lambda digest: ranks[digest])[:MIN_ITEMS]
    chosen = set(chosen_before or (below if len(below) >= MIN_ITEMS else least))
    training = tuple(record for record in dataset.records if record.sha256 not in chosen)
    if not training:
        what = f"holding out {len(chosen)} images leaves none of {len(dataset.records)} to train on"
        fix = "add images, or remove the validation section"
        raise DataError(Problem(what, "validation.fraction", fix=fix))
    held_out = _once(record for record in dataset.records if record.sha256 in chosen)
    note = f"validation: {len(held_out)} of {len(dataset.records)} images are held out"
    return Split(replace(dataset, records=training, notes=(*dataset.notes, note)), held_out)


def split_by_folder(dataset: Dataset, held_out: Dataset) -> Split:
    """Validate on another folder's images.

    Raises:
        DataError: an image is in both, or the folder has fewer than two.
    """
    trained = {record.sha256: record for record in dataset.records}
    problems = [
        Problem("a validation image is trained on too", str(record.path), f"it equals {trained[record.sha256].path}")
        for record in held_out.records
        if record.sha256 in trained
    ]
    if len(held_out.records) < MIN_ITEMS:
        problems.append(Problem(f"a probe needs {MIN_ITEMS} images at least", "validation.dir"))
    if problems:
        raise DataError(*problems)
    return Split(dataset, _once(held_out.records))


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
