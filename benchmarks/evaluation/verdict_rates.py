"""Measure how often the verdict is wrong: coverage of its interval, false wins among equal arms, power.

    python -m benchmarks.evaluation.verdict_rates [--simulations 4000]

The rates stand in docs/verdicts.md. Each simulated loss is arm + seed + noise; the seed's part is shared by all arms
of a seed, as pairing intends, and the noise is normal or heavy-tailed (t with 3 degrees of freedom).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lora_trainer.evidence.statistics.paired import paired
from lora_trainer.evidence.statistics.verdict import Arm, Outcome, Rules, compare, tuned

SEED_SD, NOISE_SD, GAIN = 4e-3, 1e-3, 0.05
Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(stream: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return NOISE_SD * stream.standard_normal(shape)


def heavy(stream: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, scaled to the same standard deviation."""
    return NOISE_SD / np.sqrt(3) * stream.standard_t(3, shape)


def arms(stream: np.random.Generator, effects: Sequence[float], num_seeds: int, noise: Noise = normal) -> list[Arm]:
    """Arms whose true losses are 1 - GAIN + effect."""
    shared = SEED_SD * stream.standard_normal(num_seeds)
    losses = 1 - GAIN + np.asarray(effects)[:, None] + shared + noise(stream, (len(effects), num_seeds))
    return [
        Arm(f"arm{index}", f"arm{index}", 1e-4, 1.0, dict(enumerate(map(float, row))))
        for index, row in enumerate(losses)
    ]


def coverage(num_simulations: int, num_seeds: int, noise: Noise = normal, seed: int = 0) -> float:
    """How often a pair's own 95 % interval holds the true difference."""
    stream, effect, held = np.random.default_rng(seed), 2e-3, 0
    for _ in range(num_simulations):
        one, other = arms(stream, (0.0, effect), num_seeds, noise)
        low, high = paired([other.losses[s] - one.losses[s] for s in one.losses]).interval()
        held += low <= effect <= high
    return held / num_simulations


def false_wins(num_simulations: int, num_arms: int, num_seeds: int, noise: Noise = normal, seed: int = 0) -> float:
    """How often any arm of several equal ones is called better. No smallest effect is asked for here."""
    stream = np.random.default_rng(seed)
    rules = Rules(min_effect=0.0)
    wins = [any_win(arms(stream, (0.0,) * num_arms, num_seeds, noise), rules) for _ in range(num_simulations)]
    return float(np.mean(wins))


def false_wins_of_tuning(
    num_simulations: int, num_lrs: int, num_flat: int, num_sharp: int, num_seeds: int, seed: int = 0
) -> float:
    """False wins among equal settings whose LR is chosen on the seeds that judge.

    Args:
        num_flat: settings with `num_lrs` equally good LRs: the best of them is lucky.
        num_sharp: settings with one good LR, which have no such luck.
    """
    stream, wins = np.random.default_rng(seed), 0
    for _ in range(num_simulations):
        num_arms = num_flat * num_lrs + num_sharp
        tried = iter(arms(stream, (0.0,) * num_arms, num_seeds))
        groups = [[next(tried) for _ in range(num_lrs)] for _ in range(num_flat)] + [[arm] for arm in tried]
        named = [[replace(arm, setting=f"s{i}") for arm in group] for i, group in enumerate(groups)]
        wins += any_win([tuned(group) for group in named], Rules(min_effect=0.0))
    return wins / num_simulations


def power(num_simulations: int, num_arms: int, num_seeds: int, effect_sd: float, seed: int = 0) -> float:
    """How often an arm that is better than all others by `effect_sd` sds of a paired difference is called so."""
    stream, effect, found = np.random.default_rng(seed), effect_sd * NOISE_SD * np.sqrt(2), 0
    for _ in range(num_simulations):
        pairs = compare(arms(stream, (0.0, *[effect] * (num_arms - 1)), num_seeds))
        found += any(p.outcome == Outcome.BETTER and p.better.name == "arm0" for p in pairs)
    return found / num_simulations


def any_win(group: Sequence[Arm], rules: Rules) -> bool:
    return any(pair.outcome == Outcome.BETTER for pair in compare(group, rules))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=4000)
    num = parser.parse_args().simulations
    print(f"{num} simulations each; standard error of a rate near 5 %: {np.sqrt(0.05 * 0.95 / num):.2%}")
    for seeds in (3, 5, 8):
        print(f"coverage of the 95 % interval, n={seeds}: normal {coverage(num, seeds):.2%},", end=" ")
        print(f"heavy-tailed {coverage(num, seeds, heavy):.2%}")
    for num_arms, seeds in ((2, 3), (2, 5), (6, 3), (6, 5), (12, 5)):
        print(f"any false win, K={num_arms}, n={seeds}: normal {false_wins(num, num_arms, seeds):.2%},", end=" ")
        print(f"heavy-tailed {false_wins(num, num_arms, seeds, heavy):.2%}")
    for lrs, flat, sharp in ((3, 6, 0), (3, 1, 1), (3, 3, 3), (5, 1, 1), (9, 1, 1)):
        rates = [false_wins_of_tuning(num, lrs, flat, sharp, seeds) for seeds in (3, 5, 8)]
        print(f"any false win, {flat} settings of {lrs} equal LRs, {sharp} of one, n=3, 5, 8:", end=" ")
        print(", ".join(f"{rate:.2%}" for rate in rates))
    for num_arms, seeds, size in ((2, 3, 3), (2, 5, 2), (6, 3, 3), (6, 5, 2), (6, 5, 4), (6, 8, 2)):
        print(f"power, K={num_arms}, n={seeds}, effect {size} sd: {power(num // 4, num_arms, seeds, size):.1%}")


if __name__ == "__main__":
    main()
