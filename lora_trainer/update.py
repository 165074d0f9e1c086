"""One optimizer update of all trials: micro-steps, one reduction, one look at the numbers, one step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_trainer import streams
from lora_trainer.adapters.bank import AdapterBank
from lora_trainer.batch import Batch, Draw, Slot
from lora_trainer.data.batches import BatchSource
from lora_trainer.families.stable_diffusion import StableDiffusion
from lora_trainer.objective import Objective
from lora_trainer.optimizers import step_size
from lora_trainer.runtime import Runtime
from lora_trainer.trial import Trial

MAX_OVERFLOWS_IN_A_ROW = 30  # fp16's scale halves at each: more than enough to come down from 2**16


@dataclass(frozen=True, slots=True)
class TrialUpdate:
    """What one update did to one trial."""

    loss: float
    grad_norm: float
    clipped: bool
    lrs: dict[str, float]
    """The LR that this update used, by group of weights."""
    step_size: float | None
    """The estimate d of a parameter-free optimizer, which multiplies the LR."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """`trials` is empty where the update was skipped; `skipped` then says why."""

    trials: dict[str, TrialUpdate]
    num_samples: int
    files: tuple[str, ...]
    """The images of this process; those of all where the update was skipped."""
    stop_asked: bool
    skipped: str | None
    base_loss: float | None
    """Loss of the frozen base on the same noised batch; None where it was not asked."""
    draws: str
    """Hash of the images, timesteps and noise of this process: equal for runs that saw the same."""


@dataclass
class _Sums:
    """What the micro-steps of one update add up to; losses of the K trials and of the base."""

    num_samples: int
    losses_K1: torch.Tensor
    files: list[str] = field(default_factory=list)
    draws: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=8))


class Updater:
    """Runs attempts. All it needs of the past is in the trials and in the gradient scaler."""

    def __init__(
        self,
        family: StableDiffusion,
        bank: AdapterBank,
        trials: Sequence[Trial],
        batches: BatchSource,
        objective: Objective,
        runtime: Runtime,
        *,
        seed: int,
        accumulation: int,
        base_loss_every: int | None,
    ) -> None:
        self._family, self._bank, self._trials = family, bank, list(trials)
        self._batches, self._objective, self._runtime = batches, objective, runtime
        self._seed, self._accumulation, self._base_loss_every = seed, accumulation, base_loss_every
        self._passes = [(trial,) for trial in self._trials]  # one trial per pass
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")

    def run(self, attempt: int, step: int, *, stop_asked: bool) -> UpdateResult:
        """Try one update: applied if every number is finite, skipped whole otherwise.

        Args:
            attempt: decides data, timesteps and noise.
            step: completed updates so far; decides the LR.
            stop_asked: whether this process was told to stop; the answer says it of any process.
        """
        for trial in self._trials:
            trial.clear_gradients()
        with_base = self._base_loss_every is not None and step % self._base_loss_every == 0
        sums = _Sums(
            self._batches.num_samples_of(attempt), torch.zeros(len(self._trials) + 1, device=self._runtime.device)
        )
        for micro_step in range(self._accumulation):
            slots = self._batches.slots_of(attempt, micro_step, self._runtime.launch.rank)
            if slots:
                self._backward(slots, sums, with_base=with_base)
        stopping = self._reduce(sums.losses_K1, stop_asked)
        norms_K = [self._clip(trial) for trial in self._trials]
        numbers = torch.cat([sums.losses_K1, torch.stack(norms_K)]).tolist()  # the one host sync of an update
        losses, base_loss, norms = numbers[: len(norms_K)], numbers[len(norms_K)], numbers[len(norms_K) + 1 :]
        skipped = self._fault(losses, norms)
        done = {} if skipped else self._apply(step, losses, norms)
        if self.scaler.is_enabled():
            self.scaler.update()
        return UpdateResult(
            trials=done,
            num_samples=sums.num_samples,
            files=tuple(self._runtime.from_all(sums.files) if skipped else sums.files),
            stop_asked=stopping,
            skipped=skipped,
            base_loss=base_loss if with_base else None,
            draws=sums.draws.hexdigest(),
        )

    def _backward(self, slots: Sequence[Slot], sums: _Sums, *, with_base: bool) -> None:
        """Forward and backward of one micro-batch for every pass; the gradients of a sum over trials are solo ones."""
        batch = self._batches.at(slots)
        draw = self._objective.draw(batch, self._seed)
        noisy_BChw = self._objective.noisy(batch.latents_BChw, draw)
        for index, (trial,) in enumerate(self._passes):
            if trial.config.adapter.dropout:
                torch.manual_seed(streams.torch_seed(self._seed, "adapter dropout", *slots[0]))
            with self._bank.active([trial.adapter]):
                loss = self._loss(batch, draw, noisy_BChw) / sums.num_samples
                self.scaler.scale(loss).backward()
            sums.losses_K1[index] += loss.detach()
        if with_base:
            with torch.no_grad(), self._bank.disabled():
                sums.losses_K1[-1] += self._loss(batch, draw, noisy_BChw) / sums.num_samples
        sums.files += batch.files
        sums.draws.update(f"{draw.digest}{batch.files}".encode())

    def _loss(self, batch: Batch, draw: Draw, noisy_BChw: torch.Tensor) -> torch.Tensor:
        """Sum of the weighted losses of a micro-batch with whatever adapter acts."""
        with self._runtime.autocast():
            prediction = self._family.predict(self._bank.denoiser, noisy_BChw, draw.timesteps_B, batch.conditioning)
        return (self._objective.loss(prediction, batch.latents_BChw, draw) * batch.weight_B).sum()

    def _reduce(self, losses_K1: torch.Tensor, stop_asked: bool) -> bool:
        """Sum gradients, losses and the wish to stop over all processes, in one flat tensor; in place."""
        if self._runtime.launch.num_processes == 1:
            return stop_asked
        parameters = [p for trial in self._trials for p in trial.parameters.values()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        wish = torch.full((1,), float(stop_asked), device=losses_K1.device)
        flat = torch.cat([*(g.reshape(-1) for g in gradients), losses_K1, wish])
        flat = self._runtime.sum_over_processes(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
        losses_K1.copy_(flat[offset:-1])
        return bool(flat[-1] > 0)

    def _clip(self, trial: Trial) -> torch.Tensor:
        if self.scaler.is_enabled():
            self.scaler.unscale_(trial.optimizer)
        return trial.clip()

    def _fault(self, losses: Sequence[float], norms: Sequence[float]) -> str | None:
        if not all(map(math.isfinite, losses)):
            return "loss"
        if not all(map(math.isfinite, norms)):
            return "fp16 overflow" if self.scaler.is_enabled() else "gradient"
        return None

    def _apply(self, step: int, losses: Sequence[float], norms: Sequence[float]) -> dict[str, TrialUpdate]:
        done = {}
        for trial, loss, norm in zip(self._trials, losses, norms, strict=True):
            limit = trial.config.train.max_grad_norm
            lrs = trial.apply_update(step)
            done[trial.name] = TrialUpdate(
                loss, norm, limit is not None and norm > limit, lrs, step_size(trial.optimizer)
            )
        return done

    def state(self) -> dict[str, Any]:
        """The gradient scaler's numbers; empty but for fp16."""
        return self.scaler.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
