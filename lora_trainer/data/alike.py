"""Which pictures look nearly alike: difference hashes that few bits tell apart, joined into clusters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

MAX_DISTANCE = 6
"""Bits by which the looks of near-copies differ at most; clusters are connected by such steps."""
_BAND_BITS = 9
"""Of seven bands of a look at least one is equal where at most six bits differ."""
_BLOCK = 2**20
"""Pairs compared at once."""


def look_of(image: Image.Image) -> int:
    """The 64-bit difference hash: whether each of 9 x 8 gray cells is darker than the one right of it."""
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes(), "big")


def is_plain(look: int) -> bool:
    """Whether a look is about that of an empty picture or of one ramp, which many pictures share that are not alike."""
    return not MAX_DISTANCE < look.bit_count() < 64 - MAX_DISTANCE


def clusters(looks: Mapping[str, int]) -> list[list[str]]:
    """The contents, given with their looks, by what looks alike; most stand alone.

    Plain pictures are alike where their looks are equal, flat ones and ramps, whose looks say nothing, never.
    """
    values, place = np.unique(np.array(list(looks.values()), np.uint64), return_inverse=True)
    label, num_bits = np.arange(len(values)), np.bitwise_count(values)
    telling = np.flatnonzero((num_bits > MAX_DISTANCE) & (num_bits < 64 - MAX_DISTANCE))
    for shift in range(0, 63, _BAND_BITS):
        band = values[telling] >> np.uint64(shift)
        if shift < 63 - _BAND_BITS:
            band &= np.uint64(2**_BAND_BITS - 1)
        order = np.argsort(band, kind="stable")
        ends = np.flatnonzero(np.diff(band[order], append=band[order][-1:] + np.uint64(1))) + 1
        for first, end in zip((0, *ends), ends, strict=False):
            if end - first > 1:
                _join_near(values, label, telling[order[first:end]])
    groups: dict[object, list[str]] = {}
    for content, value in zip(looks, place, strict=True):
        alone = num_bits[value] in (0, 64)
        groups.setdefault(content if alone else int(label[value]), []).append(content)
    return list(groups.values())


def _join_near(values: np.ndarray, label: np.ndarray, bucket: np.ndarray) -> None:
    """Give one label to what is connected by near looks within a bucket of places."""
    rows = max(1, _BLOCK // len(bucket))
    for start in range(0, len(bucket) - 1, rows):
        part, rest = bucket[start : start + rows], bucket[start:]
        if (label[rest] == label[rest[0]]).all():
            return
        near = np.bitwise_count(values[part][:, None] ^ values[rest]) <= MAX_DISTANCE
        first, second = (places[index] for places, index in zip((part, rest), np.nonzero(near), strict=True))
        while (apart := label[first] != label[second]).any():
            first, second = first[apart], second[apart]
            of_both = label[first], label[second]
            np.minimum.at(label, np.maximum(*of_both), np.minimum(*of_both))
            while (label != label[label]).any():
                label[:] = label[label]
