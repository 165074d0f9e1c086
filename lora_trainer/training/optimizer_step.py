"""One optimizer update of all trials: micro-steps, one reduction, one look at the numbers, one step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_trainer.data.batches import BatchSource
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Batch, Draw, Slot, tile
from lora_trainer.diffusion.objective import Objective
from lora_trainer.models.adapters.bank import AdapterBank
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.runtime.runtime import Runtime
from lora_trainer.training.optimizers import step_size
from lora_trainer.training.trial import Ending, Trial

MAX_OVERFLOWS_IN_A_ROW = 30  # fp16's scale halves at each: more than enough to come down from 2**16
FAULTS = ("loss", "gradient", "fp16 overflow")
"""What may not be finite, the more telling first."""


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
    """Runs attempts. All it needs of the past is in the trials and in the gradient scaler.

    Args:
        passes: the trials of each forward; together they are all trials.
        drop_failed: a trial whose numbers are not finite ends and keeps its place, with no weight in the loss, so that
            the others stay untouched to the bit. Otherwise the whole update is skipped.
    """

    def __init__(
        self,
        family: StableDiffusion,
        bank: AdapterBank,
        passes: Sequence[Sequence[Trial]],
        batches: BatchSource,
        objective: Objective,
        runtime: Runtime,
        *,
        seed: int,
        accumulation: int,
        base_loss_every: int | None,
        drop_failed: bool = False,
    ) -> None:
        self._family, self._bank, self._passes = family, bank, [tuple(members) for members in passes]
        self._trials = [trial for members in self._passes for trial in members]
        self._rows = {trial.name: row for row, trial in enumerate(self._trials)}
        self._drop_failed = drop_failed
        self._batches, self._objective, self._runtime = batches, objective, runtime
        self._seed, self._accumulation, self._base_loss_every = seed, accumulation, base_loss_every
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")

    @property
    def has_live_trials(self) -> bool:
        return any(trial.is_live for trial in self._trials)

    def pack(self, passes: Sequence[Sequence[Trial]]) -> None:
        """Share forwards among the same trials in another way."""
        self._passes = [tuple(members) for members in passes]

    def activation_bytes(self) -> int:
        """What the forward of one micro-batch keeps for its backward, per trial. Changes nothing."""
        trial = self._passes[0][0]
        batch = self._batches.at(self._batches.slots_of(0, 0, 0))
        draw = self._objective.draw(batch, self._seed)
        frozen = {p.untyped_storage().data_ptr() for p in self._bank.denoiser.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            self._bank.active([trial.adapter]),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            losses = self._losses(batch, draw, self._objective.noisy(batch.latents_BChw, draw), 1)
        del losses
        return sum(kept.values())

    def run(self, attempt: int, step: int, *, stop_asked: bool) -> UpdateResult:
        """Try one update: applied if every number is finite, skipped whole otherwise.

        Args:
            attempt: decides data, timesteps and noise.
            step: completed updates so far; decides the LR.
            stop_asked: whether this process was told to stop; the answer says it of any process.
        """
        for trial in self._trials:
            trial.fork_if_due(step)
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
        live = [trial for trial in self._trials if trial.is_live and trial.trunk is None]
        norms = torch.stack([self._clip(trial) for trial in live])
        numbers = torch.cat([sums.losses_K1, norms]).tolist()  # the one host sync of an update
        losses, base_loss = numbers[: len(self._trials)], numbers[len(self._trials)]
        measured = {
            trial.name: (losses[self._rows[trial.name]], norm)
            for trial, norm in zip(live, numbers[len(self._trials) + 1 :], strict=True)
        }
        faults = {name: fault for name, (loss, norm) in measured.items() if (fault := self._fault(loss, norm))}
        skipped = None if self._drop_failed or not faults else min(faults.values(), key=FAULTS.index)
        done = {} if skipped else self._apply(step, measured, faults)
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
        for own in self._passes:
            members = [trial for trial in own if trial.trunk is None]
            live = [place for place, trial in enumerate(members) if trial.is_live]
            if not live:
                continue
            if members[0].config.adapter.dropout:
                torch.manual_seed(random_streams.torch_seed(self._seed, "adapter dropout", *slots[0]))
            with self._bank.active([trial.adapter for trial in members]):
                losses_P = self._losses(batch, draw, noisy_BChw, len(members)) / sums.num_samples
                self.scaler.scale(losses_P[live].sum()).backward()
            rows = [self._rows[trial.name] for trial in members]
            sums.losses_K1[rows] += losses_P.detach()
        if with_base:
            with torch.no_grad(), self._bank.disabled():
                sums.losses_K1[-1] += self._losses(batch, draw, noisy_BChw, 1)[0] / sums.num_samples
        sums.files += batch.files
        sums.draws.update(f"{draw.digest}{batch.files}".encode())

    def _losses(self, batch: Batch, draw: Draw, noisy_BChw: torch.Tensor, num_trials: int) -> torch.Tensor:
        """Sum of the weighted losses of a micro-batch [P], for each trial of the pass that acts."""
        said, draw_PB = batch.conditioning.tiled(num_trials), draw.tiled(num_trials)
        with self._runtime.autocast():
            noisy_PBChw = tile(noisy_BChw, num_trials)
            prediction = self._family.predict(self._bank.denoiser, noisy_PBChw, draw_PB.timesteps_B, said)
        losses_PB = self._objective.loss(prediction, tile(batch.latents_BChw, num_trials), draw_PB)
        return (losses_PB * tile(batch.weight_B, num_trials)).unflatten(0, (num_trials, -1)).sum(1)

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

    def _fault(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "loss"
        if not math.isfinite(norm):
            return "fp16 overflow" if self.scaler.is_enabled() else "gradient"
        return None

    def _apply(
        self, step: int, measured: Mapping[str, tuple[float, float]], faults: Mapping[str, str]
    ) -> dict[str, TrialUpdate]:
        """Update the trials whose numbers are finite; the others end here. Those that share a trunk's do as it does."""
        done = {}
        for trial in self._trials:
            if trial.trunk is None and trial.name in measured and trial.name not in faults:
                loss, norm = measured[trial.name]
                limit = trial.config.train.max_grad_norm
                lrs = trial.apply_update(step)
                done[trial.name] = TrialUpdate(
                    loss, norm, limit is not None and norm > limit, lrs, step_size(trial.optimizer)
                )
        for trial in self._trials:
            source = trial.source.name
            if trial.is_live and source in faults:
                trial.end(Ending(step, "failed", f"its {faults[source]} was not finite"))
            elif trial.is_live and source in done:
                done[trial.name] = done[source]
        return done

    def state(self) -> dict[str, Any]:
        """The gradient scaler's numbers; empty but for fp16."""
        return self.scaler.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
