"""Near-copies: found as by comparing all with all, and never on both sides of a split."""

from __future__ import annotations

import hashlib
import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_trainer.data.alike import MAX_DISTANCE, clusters, is_plain, look_of
from lora_trainer.data.holdout import split_by_folder, split_by_fraction
from lora_trainer.data.records import Dataset, Record
from lora_trainer.errors import DataError

FLAT = (0, 2**64 - 1)


def changed(look: int, rng: np.random.Generator, most: int) -> int:
    for bit in rng.integers(0, 64, rng.integers(0, most + 1)):
        look ^= 1 << int(bit)
    return look


def random_looks(rng: np.random.Generator) -> dict[str, int]:
    """Bursts, chains of small steps, pictures of their own, plain and flat ones."""
    seeds = [int(look) for look in rng.integers(0, 2**64, 5, dtype=np.uint64)] + [0b10110 << 30, *FLAT]
    looks = [changed(seeds[int(rng.integers(len(seeds)))], rng, 8) for _ in range(rng.integers(3, 30))]
    looks += [int(look) for look in rng.integers(0, 2**64, rng.integers(0, 20), dtype=np.uint64)]
    return {hashlib.sha256(f"{rng.integers(2**60)}{index}".encode()).hexdigest(): v for index, v in enumerate(looks)}


def are_near(one: int, other: int) -> bool:
    """The rule, for one pair."""
    if one == other:
        return one not in FLAT
    return not is_plain(one) and not is_plain(other) and (one ^ other).bit_count() <= MAX_DISTANCE


def by_brute_force(looks: dict[str, int]) -> set[frozenset[str]]:
    groups = {content: {content} for content in looks}
    for one, other in combinations(looks, 2):
        if are_near(looks[one], looks[other]) and groups[one] is not groups[other]:
            groups[one] |= groups[other]
            for content in groups[other]:
                groups[content] = groups[one]
    return {frozenset(group) for group in groups.values()}


def test_clusters_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        looks = random_looks(rng)
        assert {frozenset(group) for group in clusters(looks)} == by_brute_force(looks)
    assert clusters({}) == []


def test_many_near_copies_are_one_cluster() -> None:
    rng = np.random.default_rng(1)
    looks = {str(index): changed(0x0123456789ABCDEF, rng, 3) for index in range(20_000)}
    assert len(clusters(looks)) == 1


def dataset(looks: dict[str, int]) -> Dataset:
    return Dataset(tuple(Record(Path(c), c, c, (64, 64), 1, ("x",), look) for c, look in looks.items()), ())


def test_no_cluster_is_on_both_sides_in_a_thousand_sets() -> None:
    rng, refused = np.random.default_rng(2), 0
    for seed in range(1000):
        looks, fraction = random_looks(rng), float(rng.uniform(0.01, 0.5))
        try:
            split = split_by_fraction(dataset(looks), fraction, seed, None)
        except DataError:
            refused += 1
            continue
        held_out = {record.sha256 for record in split.held_out}
        trained = {record.sha256 for record in split.training.records}
        assert len(held_out) >= 2
        assert trained
        assert not held_out & trained
        assert held_out | trained == set(looks)
        for one in held_out:
            assert not any(are_near(looks[one], looks[other]) for other in trained)
    assert refused < 20


def test_without_near_copies_the_choice_is_by_each_content_alone() -> None:
    rng = np.random.default_rng(3)
    for seed in range(100):
        contents = [hashlib.sha256(f"{seed} {index}".encode()).hexdigest() for index in range(rng.integers(3, 40))]
        ranks = {c: hashlib.sha256(f"{seed}:{c}".encode()).digest()[:8] for c in contents}
        below = {c for c in contents if int.from_bytes(ranks[c], "big") / 2**64 < 0.2}
        expected = below if len(below) >= 2 else set(sorted(contents, key=ranks.__getitem__)[:2])
        split = split_by_fraction(dataset(dict.fromkeys(contents, 0)), 0.2, seed, None)
        assert {record.sha256 for record in split.held_out} == expected


def test_a_split_that_a_run_began_with_is_kept_and_its_near_copies_are_told() -> None:
    rng = np.random.default_rng(4)
    looks = {str(index): int(look) for index, look in enumerate(rng.integers(0, 2**64, 10, dtype=np.uint64))}
    looks["1"] = looks["0"] ^ 1
    split = split_by_fraction(dataset(looks), 0.2, 0, ["0", "5"])
    assert [record.name for record in split.held_out] == ["0", "5"]
    assert any("1 held-out images look nearly like trained ones: 0" in note for note in split.training.notes)
    outside = dataset({"a": looks["3"] ^ 2, "b": ~looks["4"] & (2**64 - 1)})
    assert any(
        "look nearly like trained ones: a" in note for note in split_by_folder(dataset(looks), outside).training.notes
    )


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        ({"a": 5}, "leaves none of 1"),
        ({"a": 5 << 9, "b": 5 << 9}, "look nearly alike"),
        ({str(index): 0x0123456789ABCDEF ^ 1 << index for index in range(9)}, "9 of them look nearly alike"),
    ],
)
def test_too_few_that_differ_are_told(looks: dict[str, int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        split_by_fraction(dataset(looks), 0.2, 0, None)


def test_equal_images_are_told() -> None:
    (one,) = dataset({"a": 5}).records
    with pytest.raises(DataError, match="they are equal"):
        split_by_fraction(Dataset((one, one), ()), 0.2, 0, None)


def photo(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((240, 160), Image.Resampling.BICUBIC)


def test_smaller_recompressed_and_brighter_copies_look_alike_and_others_do_not() -> None:
    pictures = {}
    for seed in range(8):
        original, saved = photo(seed), io.BytesIO()
        original.save(saved, "JPEG", quality=60)
        copies = [original, Image.open(saved), original.resize((97, 64)), original.point(lambda value: value * 0.8)]
        pictures |= {f"{seed}-{number}": look_of(copy) for number, copy in enumerate(copies)}
    assert sorted(map(sorted, clusters(pictures))) == [[f"{s}-{n}" for n in range(4)] for s in range(8)]


def test_flat_pictures_and_ramps_are_never_alike() -> None:
    flat = [Image.new("RGB", (30, 20), colour) for colour in ("red", "white", "black")]
    ramps = [Image.linear_gradient("L").rotate(angle) for angle in (0, 90)]
    looks = {str(number): look_of(image) for number, image in enumerate([*flat, *ramps])}
    assert len(clusters(looks)) == len(looks)
    assert all(is_plain(look) for look in looks.values())
