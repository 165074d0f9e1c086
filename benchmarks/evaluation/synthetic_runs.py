"""Made-up runs whose state is known by construction, as the rows that `metrics.jsonl` would hold.

A run has a schedule of ours, N images per probe that differ in how much they gain, and a gain that follows the sum of
the LRs: g = G (1 - exp(-sum m / tau N)). Each fault bends that one curve. Sizes are drawn anew for each seed; the
scatter between probes is that of healthy real runs (`benchmarks/evaluation/calibrate_diagnosis.py` measures it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lora_trainer.config.schema import RunConfig
from lora_trainer.evidence.diagnosis.findings import State
from lora_trainer.evidence.diagnosis.log import RunFacts, TrialLog
from lora_trainer.schedules.registry import SCHEDULES
from lora_trainer.schedules.schedule import Horizon

Row = dict[str, Any]
TRIAL, BASE_LOSS, LR = "synthetic", 0.2, 1e-3
DECAYING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cosine", {"warmup_steps": "5%"}),
    ("linear", {"warmup_steps": "5%"}),
    ("linear", {}),
    ("warmup_stable_decay", {"warmup_steps": "5%", "decay_steps": "20%"}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"power": 2.0}),
)
FLAT: tuple[tuple[str, dict[str, Any]], ...] = (("constant", {}), ("constant_with_warmup", {"warmup_steps": "5%"}))


@dataclass
class Case:
    """The curves of one run before they are written as rows; M measurements, the first before any update."""

    rng: np.random.Generator
    num_steps: int
    steps_M: np.ndarray
    multipliers: np.ndarray
    size: float
    """Gain over the base in the long run, as a share of the base's loss."""
    gain_M: np.ndarray
    train_M: np.ndarray
    prior_M: np.ndarray
    wobble: float
    """Scatter that all images share between probes, as a share of the gain, at the peak LR."""
    own_wobble: float
    """Scatter of each image by itself, likewise."""
    norms: np.ndarray
    events: list[Row] = field(default_factory=list)
    """Further events; each stands after the rows of its step."""
    skips: dict[int, str] = field(default_factory=dict)
    """Steps whose update was not applied, and what was not finite."""
    cooldown: float | None = None
    """Gain that a cooldown at the last probe brings, as a share of the gain."""

    @property
    def time(self) -> np.ndarray:
        """0 at the start, 1 at the end."""
        return self.steps_M / self.num_steps


def case(rng: np.random.Generator, schedules: tuple[tuple[str, dict[str, Any]], ...], tau: tuple[float, float]) -> Case:
    """A run in which nothing is wrong, with tau drawn between the two numbers."""
    num_steps, num_probes = int(rng.integers(100, 600)), int(rng.integers(10, 31))
    name, options = schedules[rng.integers(len(schedules))]
    laid = SCHEDULES[name](**options).resolve(Horizon(num_steps, max(1, num_steps // 10)))
    multipliers = np.asarray([laid.multiplier(k, LR) for k in range(num_steps)])
    every = num_steps // num_probes
    steps = np.asarray([0, *(s for s in range(1, num_steps + 1) if s % every == 0 or s == num_steps)])
    budget = np.concatenate([[0], np.cumsum(multipliers)])[steps] / num_steps
    size = float(np.exp(rng.uniform(np.log(0.03), np.log(0.5))))
    gain = size * (1 - np.exp(-budget / rng.uniform(*tau)))
    time = steps / num_steps
    return Case(
        rng=rng,
        num_steps=num_steps,
        steps_M=steps,
        multipliers=multipliers,
        size=size,
        gain_M=gain,
        train_M=gain * rng.uniform(1, 1.3),
        prior_M=rng.uniform(-0.01, 0.03) * time,
        wobble=rng.uniform(0, 0.03),
        own_wobble=rng.uniform(0.002, 0.02),
        norms=np.exp(rng.normal(np.log(rng.uniform(0.02, 0.5)), 0.5, num_steps)),
    )


def healthy(rng: np.random.Generator) -> Case:
    """Still gaining at a flat LR, or gaining and then decaying; the held-out gain may sag a little at the end."""
    if rng.random() < 0.4:
        return case(rng, FLAT, (0.5, 2.0))
    made = case(rng, DECAYING, (0.1, 0.6))
    made.gain_M = made.gain_M * (1 - rng.uniform(0, 0.04) * np.clip(made.time - 0.6, 0, 1) / 0.4)
    return made


def non_finite(rng: np.random.Generator) -> Case:
    made = healthy(rng)
    steps = rng.integers(1, made.num_steps, rng.integers(1, 4))
    made.skips = {int(step): str(rng.choice(["loss", "gradient"])) for step in steps}
    return made


def diverged(rng: np.random.Generator) -> Case:
    """From some moment on the loss climbs above the base's, or the denoiser predicts nothing."""
    made = case(rng, FLAT + DECAYING[:2], (0.1, 1.0))
    start, level = rng.uniform(0, 0.6), rng.choice([rng.uniform(1.2, 3), 1 / BASE_LOSS])
    climbed = np.clip((made.time - start) / rng.uniform(0.02, 0.2), 0, 1)
    made.gain_M = made.gain_M * (1 - climbed) - (level - 1) * climbed
    made.train_M = made.gain_M * rng.uniform(0.9, 1.1)
    return made


def oscillating(rng: np.random.Generator) -> Case:
    """Independent jumps at each probe, far above a healthy run's scatter."""
    made = case(rng, FLAT, (0.05, 0.5))
    made.wobble = rng.uniform(0.3, 0.8)
    made.cooldown = rng.uniform(0.2, 0.5) if rng.random() < 0.5 else None
    return made


def restart_shock(rng: np.random.Generator) -> Case:
    """A restart loses a part of the gain, most of which does not come back within the cycle."""
    cycles = int(rng.integers(2, 4))
    made = case(rng, (("cosine_with_restarts", {"num_cycles": cycles}),), (0.05, 0.15))
    lost = np.zeros_like(made.gain_M)
    for cycle in range(1, cycles):
        since = (made.time - cycle / cycles) * cycles
        lost += rng.uniform(0.15, 0.5) * (since > 0) * (1 - rng.uniform(0, 0.4) * np.clip(since, 0, 1))
    made.gain_M, made.train_M = made.gain_M - lost * made.size, made.train_M - lost * made.size
    return made


def overfit(rng: np.random.Generator) -> Case:
    """The held-out gain turns and is lost again; that of the training images goes on."""
    made = case(rng, FLAT + DECAYING[:3], (0.05, 0.3))
    turn, lost = rng.uniform(0.2, 0.6), rng.uniform(0.25, 1.5)
    late = np.clip((made.time - turn) / (1 - turn), 0, 1)
    made.gain_M = made.gain_M * (1 - lost * late)
    made.train_M = made.train_M * (1 + rng.uniform(0.3, 1.5) * late)
    return made


def forgetting(rng: np.random.Generator) -> Case:
    made = healthy(rng)
    made.prior_M = rng.uniform(0.1, 0.5) * made.time ** rng.uniform(0.5, 1.5)
    return made


def never_started(rng: np.random.Generator) -> Case:
    """An LR far too low: all images gain a hair; or weights that do nothing."""
    made = case(rng, FLAT + DECAYING, (0.5, 2.0))
    share = rng.uniform(0, 0.0012) / made.size
    made.gain_M, made.train_M, made.size = made.gain_M * share, made.train_M * share, made.size * share
    made.prior_M = made.prior_M * 0.01
    return made


def stagnant(rng: np.random.Generator) -> Case:
    """All was learned early on, and the LR is still at its peak."""
    return case(rng, FLAT, (0.03, 0.12))


def lr_noise_limited(rng: np.random.Generator) -> Case:
    """A cooldown from the last probe gains what the LR's noise withholds."""
    made = case(rng, FLAT, (0.3, 1.0))
    made.cooldown = rng.uniform(0.08, 0.3)
    return made


def clipping(rng: np.random.Generator) -> Case:
    made = healthy(rng)
    made.norms = np.exp(rng.normal(np.log(rng.uniform(1.5, 10)), 0.4, made.num_steps))
    return made


def finished_decaying(rng: np.random.Generator) -> Case:
    """All was learned early on, and the LR has come down since."""
    return case(rng, DECAYING[:3], (0.03, 0.1))


CASES: dict[State, Callable[[np.random.Generator], Case]] = {
    State.HEALTHY: healthy,
    State.NON_FINITE: non_finite,
    State.DIVERGED: diverged,
    State.OSCILLATING: oscillating,
    State.RESTART_SHOCK: restart_shock,
    State.OVERFIT: overfit,
    State.FORGETTING: forgetting,
    State.NEVER_STARTED: never_started,
    State.STAGNANT: stagnant,
    State.LR_NOISE_LIMITED: lr_noise_limited,
    State.CLIPPING: clipping,
    State.FINISHED_DECAYING: finished_decaying,
}


def synthetic_rows(state: State, seed: int) -> tuple[list[Row], int]:
    """The rows of the log of a made-up run in this state, and its number of updates."""
    rng = np.random.default_rng([seed, *str(state).encode()])
    made = CASES[state](rng)
    num_images = int(rng.choice([2, 2, 2, 3, 4, 6, 8, 12]))  # the cost cap leaves many runs two
    by_step: dict[int, list[Row]] = {}
    probes = {"held_out": (made.gain_M, made.size), "train": (made.train_M, made.size), "prior": (-made.prior_M, 0.02)}
    for probe, (gain_M, size) in probes.items():
        for index, items in enumerate(_items(made, gain_M, size, num_images)):
            by_step.setdefault(int(made.steps_M[index]), []).append(_validation(probe, int(made.steps_M[index]), items))
    if made.cooldown is not None:
        last = by_step[made.num_steps][0]
        fall = made.cooldown * made.size * np.clip(rng.normal(1, 0.35, num_images), 0.3, 2)
        items = list(np.asarray(last["items"]) - fall)
        made.events.append({"event": "cooldown", "step": made.num_steps, "updates": 10, "items": items})
    for event in made.events:
        by_step.setdefault(event["step"], []).append({"trial": TRIAL, **event})
    rows = list(by_step.get(0, []))
    for k, multiplier in enumerate(made.multipliers):
        row = _update(made, k, multiplier)
        rows += [_skip(k + 1, made.skips[k + 1]) if k + 1 in made.skips else row, *by_step.get(k + 1, [])]
    return rows, made.num_steps


def synthetic_run(state: State, seed: int) -> tuple[list[Row], RunFacts]:
    """The rows and what else is known of the run."""
    rows, num_steps = synthetic_rows(state, seed)
    lrs = [row["lr"] for row in rows if "lr" in row]
    return rows, replace(run_facts(num_steps), final_multiplier=lrs[-1] / max(lrs))


def synthetic_log(state: State, seed: int) -> tuple[TrialLog, RunFacts]:
    """The same as the rules see it."""
    rows, run = synthetic_run(state, seed)
    log = TrialLog()
    for row in rows:
        log.add(row)
    return log, run


def run_facts(num_steps: int, **settings: Any) -> RunFacts:
    """Facts of a run with otherwise default settings, and an LR that stays."""
    plain = {"name": TRIAL, "model": {"path": "base"}, "data": {"dir": "images"}, "train": {"max_steps": num_steps}}
    return RunFacts(num_steps, max(1, num_steps // 10), 1.0, RunConfig.model_validate(plain | settings))


def _items(made: Case, gain_M: np.ndarray, size: float, num_images: int) -> np.ndarray:
    """Losses [M, N] relative to the base: each image gains its own share, and scatters as the LR makes it."""
    base_N = np.exp(made.rng.normal(0, 0.3, num_images))
    base_N /= base_N.mean()
    share_N = np.clip(made.rng.normal(1, 0.35, num_images), 0.2, 2)
    lr_M = np.concatenate([[0], made.multipliers])[made.steps_M]
    shared_M = made.rng.normal(0, made.wobble * size, len(gain_M)) * lr_M
    own_MN = made.rng.normal(0, made.own_wobble * size, (len(gain_M), num_images)) * lr_M[:, None]
    return base_N * (1 - (gain_M + shared_M)[:, None] * share_N - own_MN)


def _validation(probe: str, step: int, items: np.ndarray) -> Row:
    loss = float(BASE_LOSS * items.mean())
    return {"event": "validation", "step": step, "trial": TRIAL, "probe": probe, "loss": loss, "items": items.tolist()}


def _skip(step: int, reason: str) -> Row:
    return {"event": "skip", "step": step, "trial": TRIAL, "reason": reason, "files": ["a"]}


def _update(made: Case, k: int, multiplier: float) -> Row:
    norm = float(made.norms[k])
    row = {"step": k + 1, "trial": TRIAL, "lr": LR * multiplier, "grad_norm": norm, "clipped": norm > 1}
    if k % 10 == 0:
        gain = np.interp(k, made.steps_M, made.train_M)
        row["ratio"] = float((1 - gain) * (1 + made.rng.normal(0, 0.068)))
    return row
