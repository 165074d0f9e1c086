"""Which pictures look nearly alike: difference hashes that few bits tell apart, joined into clusters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

MAX_DISTANCE = 6
"""Bits by which the looks of near-copies differ at most; clusters are connected by such steps."""


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
    left = np.flatnonzero((num_bits > MAX_DISTANCE) & (num_bits < 64 - MAX_DISTANCE))
    while len(left):
        reached, left = [left[0]], left[1:]
        while reached:
            one = reached.pop()
            is_near = np.bitwise_count(values[left] ^ values[one]) <= MAX_DISTANCE
            if is_near.any():
                label[left[is_near]] = label[one]
                reached += [*left[is_near]]
                left = left[~is_near]
    groups: dict[object, list[str]] = {}
    for content, value in zip(looks, place, strict=True):
        alone = num_bits[value] in (0, 64)
        groups.setdefault(content if alone else int(label[value]), []).append(content)
    return list(groups.values())
