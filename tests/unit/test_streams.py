"""Counter-based randomness: a pure function of its key."""

from __future__ import annotations

import torch

from lora_trainer.diffusion import random_streams


def test_equal_keys_give_equal_draws_whatever_came_before() -> None:
    first = random_streams.normal((4, 8), 1, "noise", 0, 5)
    random_streams.normal((100,), 1, "noise", 0, 6)
    torch.rand(10)
    assert torch.equal(random_streams.normal((4, 8), 1, "noise", 0, 5), first)


def test_any_other_key_gives_another_draw() -> None:
    keys = [
        (1, "noise", 0, 5),
        (2, "noise", 0, 5),
        (1, "latent", 0, 5),
        (1, "noise", 1, 5),
        (1, "noise", 0, 6),
        (1, "noise", 5, 0),
    ]
    draws = [random_streams.normal((16,), *key) for key in keys]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)


def test_drawing_leaves_torchs_own_randomness_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    random_streams.normal((64,), 1, "noise", 0)
    random_streams.uniform(-1, 1, (64,), 1, "init", "layer")
    assert torch.equal(torch.get_rng_state(), before)


def test_moments() -> None:
    noise = random_streams.normal((200_000,), 3, "noise", 1)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    flat = random_streams.uniform(-2, 4, (200_000,), 3, "x")
    assert flat.min() >= -2
    assert flat.max() < 4
    assert abs(flat.mean() - 1) < 0.02


def test_golden_draw() -> None:
    """Runs of earlier releases must stay repeatable: these numbers may only change with a new release note."""
    assert random_streams.stream(42, "order", 0).permutation(8).tolist() == GOLDEN_ORDER
    assert random_streams.torch_seed(42, "adapter dropout", 0, 0) == GOLDEN_SEED


GOLDEN_ORDER = [6, 7, 1, 3, 2, 4, 0, 5]
GOLDEN_SEED = 1990885341620776501
