"""The probe: the same images, timesteps and noise measured again and again, so that a small change can be seen.

Each image is noised at the midpoints of 16 timestep strata with noise of its own, keyed by (image, stratum, seed). The
grid removes the variance that single training losses drown in, and two measurements are paired image by image. Values
are told relative to the frozen base, stratum by stratum, so that no end of the timestep range outweighs the others.
Plateau schedules react to a measurement, the best LoRA is remembered, and `sweep.prune` ends trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lora_trainer.config.schema import ValidationConfig
from lora_trainer.data.batches import PromptStore
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import ProbeItems
from lora_trainer.diffusion.noise_paths import NoisedLatents, NoisePath
from lora_trainer.evidence.statistics.paired import paired_rise, rise_in_se
from lora_trainer.planning.run_plan import PROBE_STRATA
from lora_trainer.tracking.metrics import HELD_OUT
from lora_trainer.training.denoiser import AdaptedDenoiser
from lora_trainer.training.trial import BestProbe, Ending, Trial

NUM_BANDS = 4
Losses = np.ndarray  # [N images, S strata] of one trial, or [P, N, S], float64


@dataclass(frozen=True, slots=True)
class ProbeReading:
    """One measurement of one probe."""

    losses_NS: Losses
    base_NS: Losses

    @property
    def items(self) -> list[float]:
        """Each image's loss relative to the base's mean of its stratum, averaged over strata; the base's mean is 1."""
        return (self.losses_NS / self.base_NS.mean(axis=0)).mean(axis=1).tolist()

    @property
    def relative(self) -> float:
        """Mean loss relative to the base: under 1 is better than the base."""
        return float(np.mean(self.items))

    @property
    def gain_se(self) -> float:
        """Standard error of the gain over the base, paired over images: the precision of this run, not of its seed."""
        base = (self.base_NS / self.base_NS.mean(axis=0)).mean(axis=1)
        return paired_rise(base, self.items).se

    @property
    def bands(self) -> list[float]:
        """The relative loss in four bands of timesteps, from little noise to much."""
        relative_S = self.losses_NS.mean(axis=0) / self.base_NS.mean(axis=0)
        return [float(band.mean()) for band in np.array_split(relative_S, NUM_BANDS)]

    def as_event(self) -> dict[str, Any]:
        """The fields of a `validation` event."""
        return {
            "loss": float(self.losses_NS.mean()),
            "base_loss": float(self.base_NS.mean()),
            "relative": self.relative,
            "gain": 1 - self.relative,
            "se": self.gain_se,
            "bands": self.bands,
            "items": [round(value, 9) for value in self.items],
        }


@dataclass(frozen=True, slots=True)
class _Views:
    """R of a probe's M = N x S noised images, on the device: what one forward of the denoiser takes."""

    rows_R: torch.Tensor
    noised: NoisedLatents
    view_tensors: Mapping[str, torch.Tensor]
    """[R, ...] by name."""
    prompts: list[str]


class Validator:
    """Measures every probe with any adapter; the noised images are made once and kept on the device."""

    def __init__(
        self,
        denoiser: AdaptedDenoiser,
        probes: Mapping[str, ProbeItems],
        prompts: PromptStore,
        config: ValidationConfig,
    ) -> None:
        self._denoiser, self._prompts, launch = denoiser, prompts, denoiser.runtime.launch
        self._probes: dict[str, list[_Views]] = {}
        for name, items in probes.items():
            rows = range(launch.rank, len(items.keys) * PROBE_STRATA, launch.num_processes)
            parts = [rows[first : first + config.batch_size] for first in range(0, len(rows), config.batch_size)]
            self._probes[name] = [_noised(items, denoiser.path, config.seed, part) for part in parts]
        self._num_images = {name: len(items.keys) for name, items in probes.items()}
        self._base: dict[str, Losses] = {}

    def measure(self, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, ProbeReading]]:
        """By adapter and probe, with these weights in these adapters, all in one forward.

        The training's state and randomness stay untouched.
        """
        base, bank = self.base(), self._denoiser.bank
        with ExitStack() as stack:
            stack.enter_context(bank.active(list(weights)))
            for adapter, tensors in weights.items():
                stack.enter_context(bank.swapped(adapter, tensors))
            losses = {probe: self._losses(probe, len(weights)) for probe in self._probes}
        return {
            adapter: {probe: ProbeReading(losses_PNS[place], base[probe]) for probe, losses_PNS in losses.items()}
            for place, adapter in enumerate(weights)
        }

    def base(self) -> dict[str, Losses]:
        """Each probe with the frozen base alone; measured once."""
        if not self._base:
            with self._denoiser.bank.disabled():
                self._base = {name: self._losses(name, 1)[0] for name in self._probes}
        return self._base

    @torch.no_grad()
    def _losses(self, probe: str, num_trials: int) -> Losses:
        """Losses [P, N, S] of the trials that act; with several processes each measures its share."""
        runtime, model = self._denoiser.runtime, self._denoiser.bank.denoiser
        num_rows = self._num_images[probe] * PROBE_STRATA
        losses_PM = torch.zeros(num_trials, num_rows, dtype=torch.float64, device=runtime.device)
        was_training = model.training
        model.eval()
        try:
            with runtime.phase("probe", together=True):
                for views in self._probes[probe]:
                    conditioning = self._prompts.conditioning(views.prompts, views.view_tensors, runtime.device)
                    errors_PR = self._denoiser.squared_errors(views.noised, conditioning, num_trials)
                    losses_PM[:, views.rows_R] = errors_PR.double()
        finally:
            model.train(was_training)
        return runtime.sum_over_processes(losses_PM).unflatten(1, (-1, PROBE_STRATA)).cpu().numpy()


def _noised(items: ProbeItems, path: NoisePath, seed: int, rows: Sequence[int]) -> _Views:
    """Rows (image x strata + stratum) of a probe's grid, each with its own noise."""
    shape, device = items.latents_NChw.shape[1:], items.latents_NChw.device
    images, strata = [row // PROBE_STRATA for row in rows], [row % PROBE_STRATA for row in rows]
    places = [(items.keys[image], stratum) for image, stratum in zip(images, strata, strict=True)]
    noise_RChw = torch.stack([random_streams.normal(shape, seed, "probe", *place) for place in places]).to(device)
    times_R = torch.tensor(path.strata(PROBE_STRATA), device=device)[strata]
    noised = path.at(items.latents_NChw[images], noise_RChw, times_R)
    views = {name: values[images] for name, values in items.view_tensors.items()}
    return _Views(torch.tensor(rows, device=device), noised, views, [items.prompts[image] for image in images])


@dataclass(frozen=True, slots=True)
class Measurement:
    """One trial's probes after some update, and what they changed."""

    trial: Trial
    readings: dict[str, ProbeReading]
    reduced: tuple[str, ...] = ()
    """LR groups whose plateau schedule falls from the next update on."""
    is_best: bool = False

    @property
    def held_out(self) -> ProbeReading:
        return self.readings[HELD_OUT]


@dataclass(frozen=True, slots=True)
class ValidationSchedule:
    """Every process measures its share and comes to the same conclusions."""

    validator: Validator
    passes: Sequence[Sequence[Trial]]
    every: int
    num_steps: int
    diverged: float | None = None
    """Held-out loss over the base's from which a trial ends (`sweep.prune.diverged`)."""

    def is_due(self, step: int) -> bool:
        """Whether the probes are measured after this many updates."""
        return step % self.every == 0 or step == self.num_steps

    def start(self) -> list[Measurement]:
        """The probes before the first update: the base itself, as an adapter's B is zero."""
        base = {name: ProbeReading(losses, losses) for name, losses in self.validator.base().items()}
        return [Measurement(trial, base) for members in self.passes for trial in members]

    def measure(self, step: int) -> list[Measurement]:
        """Measure every live trial's exported weights, feed its schedules and compare with its best."""
        readings: dict[str, dict[str, ProbeReading]] = {}
        for members in self.passes:
            measured_apart = [trial for trial in members if trial.parent is None]  # the others with their parent
            if any(trial.is_live for trial in measured_apart):
                readings |= self.validator.measure({trial.adapter: trial.weights() for trial in measured_apart})
        trials = [trial for members in self.passes for trial in members if trial.is_live]
        measured = [_conclude(trial, step, readings[trial.computed_by.adapter]) for trial in trials]
        if step < self.num_steps and self.diverged is not None:
            for measurement in measured:
                if not (loss := measurement.held_out.relative) < self.diverged:  # NaN too
                    reason = f"held-out loss {loss:.4g} times the base's, {self.diverged:g} allowed"
                    measurement.trial.ending = Ending(step, "stopped", f"sweep.prune.diverged: {reason}")
        return measured


def _conclude(trial: Trial, step: int, readings: dict[str, ProbeReading]) -> Measurement:
    held_out = readings[HELD_OUT]
    reduced = tuple(
        group.name
        for group in trial.param_groups
        if group.schedule.feedback is not None and group.schedule.feedback.observe(step, held_out.items, rise_in_se)
    )
    is_best = math.isfinite(held_out.relative) and (trial.best is None or held_out.relative < trial.best.relative)
    if is_best:
        trial.best = BestProbe(step, held_out.relative)
    return Measurement(trial, readings, reduced, is_best)
