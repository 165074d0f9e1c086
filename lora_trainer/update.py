"""One optimizer update of all trials: micro-steps, one reduction, one look at the numbers, one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_trainer import streams
from lora_trainer.adapters.bank import AdapterBank
from lora_trainer.batch import Slot
from lora_trainer.data.batches import BatchSource
from lora_trainer.families.stable_diffusion import StableDiffusion
from lora_trainer.objective import Objective
from lora_trainer.optimizers import step_size
from lora_trainer.runtime import Runtime
from lora_trainer.trial import Trial


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
    stop_asked: bool
    skipped: str | None = None


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
    ) -> None:
        self._family, self._bank, self._trials = family, bank, list(trials)
        self._batches, self._objective, self._runtime = batches, objective, runtime
        self._seed, self._accumulation = seed, accumulation
        self._passes = [(trial,) for trial in self._trials]  # one trial per pass
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")

    def run(self, attempt: int, step: int, *, stop_asked: bool) -> UpdateResult:
        """Try one update: applied if every number is finite, skipped whole otherwise.

        Args:
            attempt: decides data, timesteps and noise.
            step: completed updates so far; decides the LR.
            stop_asked: whether this process was told to stop; the answer says it of any process.
        """
        num_samples = self._batches.num_samples_of(attempt)
        for trial in self._trials:
            trial.clear_gradients()
        losses_K = torch.zeros(len(self._trials), device=self._runtime.device)
        files: list[str] = []
        for micro_step in range(self._accumulation):
            slots = self._batches.slots_of(attempt, micro_step, self._runtime.launch.rank)
            if slots:
                files += self._backward(slots, num_samples, losses_K)
        stopping = self._reduce(losses_K, stop_asked)
        norms_K = torch.stack([self._clip(trial) for trial in self._trials])
        losses, norms = torch.stack([losses_K, norms_K]).tolist()  # the one host sync of an update
        skipped = self._fault(losses, norms)
        done = {} if skipped else self._apply(step, losses, norms)
        if self.scaler.is_enabled():
            self.scaler.update()
        return UpdateResult(done, num_samples, tuple(files), stopping, skipped)

    def _backward(self, slots: Sequence[Slot], num_samples: int, losses_K: torch.Tensor) -> tuple[str, ...]:
        """Forward and backward of one micro-batch for every pass; the gradients of a sum over trials are solo ones."""
        batch = self._batches.at(slots)
        draw = self._objective.draw(batch, self._seed)
        noisy_BChw = self._objective.noisy(batch, draw)
        for index, (trial,) in enumerate(self._passes):
            if trial.config.adapter.dropout:
                torch.manual_seed(streams.torch_seed(self._seed, "adapter dropout", *slots[0]))
            with self._bank.active([trial.adapter]), self._runtime.autocast():
                prediction = self._family.predict(self._bank.denoiser, noisy_BChw, draw.timesteps_B, batch.conditioning)
                loss_B = self._objective.loss(prediction, batch, draw) * batch.weight_B
                loss = loss_B.sum() / num_samples
                self.scaler.scale(loss).backward()
            losses_K[index] += loss.detach()
        return batch.files

    def _reduce(self, losses_K: torch.Tensor, stop_asked: bool) -> bool:
        """Sum gradients, losses and the wish to stop over all processes, in one flat tensor; in place."""
        if self._runtime.launch.num_processes == 1:
            return stop_asked
        parameters = [p for trial in self._trials for p in trial.parameters.values()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        wish = torch.full((1,), float(stop_asked), device=losses_K.device)
        flat = torch.cat([*(g.reshape(-1) for g in gradients), losses_K, wish])
        flat = self._runtime.sum_over_processes(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
        losses_K.copy_(flat[offset:-1])
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
