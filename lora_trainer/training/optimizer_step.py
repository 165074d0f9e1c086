"""One optimizer update of all trials: micro-steps, one reduction, one look at the numbers, one step per trial."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_trainer.config.schema import RunConfig
from lora_trainer.data.batches import BatchSource
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Conditioning, Slot
from lora_trainer.diffusion.noise_paths import NoisedLatents, draw
from lora_trainer.training.denoiser import AdaptedDenoiser
from lora_trainer.training.optimizers import step_size
from lora_trainer.training.trial import MAX_OVERFLOWS_IN_A_ROW, Trial

Passes = Sequence[Sequence[Trial]]


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
class StepResult:
    """What one update did."""

    trials: dict[str, TrialUpdate]
    """Of the trials that it was applied to."""
    skipped: dict[str, str]
    """Why it was not applied to others that are still trained: what was not finite."""
    num_samples: int
    files: tuple[str, ...]
    """The images of this process; those of all where a trial skipped the update."""
    stop_asked: bool
    base_loss: float | None
    """Loss of the frozen base on the same noised batch; None where it was not asked."""
    draws: str
    """Hash of the images, timesteps and noise of this process: equal for runs that saw the same."""


@dataclass
class _Sums:
    """What the micro-steps of one update add up to."""

    num_samples: int
    losses: torch.Tensor
    """[K + 1]: of the K trials, then of the frozen base."""
    files: list[str] = field(default_factory=list)
    draws: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=8))


class OptimizerStep:
    """Runs update k. All it needs of the past is in the trials.

    Args:
        passes: the trials of each forward; together they are all K trials.
        config: any trial's; seed and period of the base's loss are those of all.
        max_skips: non-finite updates in a row after which a trial has failed.
    """

    def __init__(
        self, denoiser: AdaptedDenoiser, batches: BatchSource, passes: Passes, config: RunConfig, *, max_skips: int
    ) -> None:
        self._denoiser, self._batches, self._runtime = denoiser, batches, denoiser.runtime
        self._seed, self._base_loss_every, self._max_skips = config.seed, config.tracking.base_loss_every, max_skips
        self._passes = [tuple(members) for members in passes]
        self.trials = [trial for members in self._passes for trial in members]
        self._rows = {trial.name: row for row, trial in enumerate(self.trials)}

    def pack(self, passes: Passes) -> None:
        """Share forwards among the same trials in another way."""
        self._passes = [tuple(members) for members in passes]

    @property
    def has_live_trials(self) -> bool:
        return any(trial.is_live for trial in self.trials)

    def run(self, k: int, *, stop_asked: bool) -> StepResult:
        """Update k: for each trial applied if its numbers are finite, else skipped, the others untouched to the bit.

        Args:
            stop_asked: whether this process was told to stop; the result says it of any process.
        """
        with self._runtime.phase("forward"):
            for trial in self.trials:
                trial.branch_off_if_due(k)
        with_base = self._base_loss_every is not None and k % self._base_loss_every == 0

        # 1. Forward and backward of every micro-batch; then one all-reduce of all gradients, K + 1 losses and the wish
        #    to stop. Gradients are fp32: rank 16 on the transformer layers of SD 1.5 is 6.8 M numbers, 26 MiB a trial.
        sums, stopping = self._gradients(k, with_base=with_base, stop_asked=stop_asked)

        # 2. Norm and clip per trial; the update's only wait for the device brings K + 1 losses and K norms to the host.
        live = [trial for trial in self.trials if trial.is_live]
        computed = [trial for trial in live if trial.parent is None]  # the others take their parent's update
        with self._runtime.phase("forward"):
            norms = torch.stack([trial.clip() for trial in computed])
            numbers = torch.cat([sums.losses, norms]).tolist()
        losses, norms_of = numbers[: len(self.trials) + 1], dict(zip(computed, numbers[-len(computed) :], strict=True))

        # 3. One optimizer step per trial with finite numbers; a trial without them is as it was before update k.
        applied: dict[Trial, TrialUpdate] = {}
        faults: dict[Trial, str] = {}
        with self._runtime.phase("optimizer"):
            for trial, norm in norms_of.items():
                loss, limit = losses[self._rows[trial.name]], trial.config.train.max_grad_norm
                if (fault := trial.fault(loss, norm)) is None:
                    lrs, clipped = trial.apply_update(k), limit is not None and norm > limit
                    applied[trial] = TrialUpdate(loss, norm, clipped, lrs, step_size(trial.optimizer))
                else:
                    faults[trial] = fault
        files = tuple(self._runtime.from_all(sums.files) if faults else sums.files)
        for trial in live:
            if trial.computed_by in faults:
                trial.skip(k, faults[trial.computed_by], files, self._max_skips)
        return StepResult(
            trials={trial.name: applied[trial.computed_by] for trial in live if trial.computed_by in applied},
            skipped={trial.name: faults[trial.computed_by] for trial in live if trial.computed_by in faults},
            num_samples=sums.num_samples,
            files=files,
            stop_asked=stopping,
            base_loss=losses[-1] if with_base else None,
            draws=sums.draws.hexdigest(),
        )

    def settle_scales(self, k: int) -> None:
        """Halve each new fp16 loss scale until update k has finite gradients, with room for the next; apply nothing."""
        unsettled = [trial for trial in self.trials if not trial.has_scale and trial.parent is None]
        for halvings in range(MAX_OVERFLOWS_IN_A_ROW):
            if unsettled:
                self._gradients(k, with_base=False, stop_asked=False)
                unsettled = [trial for trial in unsettled if not trial.settle_scale(has_halved=halvings > 0)]
        for trial in self.trials:
            trial.optimizer.zero_grad()

    def activation_bytes(self) -> int:
        """What the forward of one micro-batch keeps for its backward, per trial. Changes nothing."""
        batch, bank = self._batches.at(self._batches.slots_of(0, 0, 0)), self._denoiser.bank
        noised = draw(self._denoiser.path, batch, self._seed)
        frozen = {p.untyped_storage().data_ptr() for p in bank.denoiser.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            bank.active([self._passes[0][0].adapter]),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            losses = self._losses(noised, batch.conditioning, 1)
        del losses
        return sum(kept.values())

    def _gradients(self, k: int, *, with_base: bool, stop_asked: bool) -> tuple[_Sums, bool]:
        """Gradients of update k from the slots of all processes, in the parameters; what they come from, and the wish.

        Raises:
            OutOfMemory: in every process, where any was refused memory; nothing is applied.
        """
        for trial in self.trials:
            trial.optimizer.zero_grad()
        losses = torch.zeros(len(self.trials) + 1, device=self._runtime.device)
        sums = _Sums(self._batches.num_samples_of(k), losses)
        with self._runtime.refusals() as refused:
            for micro_step in range(self._batches.accumulation):
                slots = self._batches.slots_of(k, micro_step, self._runtime.launch.rank)
                if slots:
                    self._backward(slots, sums, with_base=with_base)
        return sums, self._reduce(losses, stop_asked, refused)

    def _backward(self, slots: Sequence[Slot], sums: _Sums, *, with_base: bool) -> None:
        """Forward and backward of one micro-batch for every pass.

        The losses of a pass are summed over its P trials before the backward: trials share no parameter, so each gets
        the gradient that it would have alone.
        """
        batch, bank = self._batches.at(slots), self._denoiser.bank
        noised = draw(self._denoiser.path, batch, self._seed)
        for trials in self._passes:
            members = [trial for trial in trials if trial.parent is None]
            live = [place for place, trial in enumerate(members) if trial.is_live]
            if not live:
                continue
            if members[0].config.adapter.dropout:
                torch.manual_seed(random_streams.torch_seed(self._seed, "adapter dropout", *slots[0]))
            with bank.active([trial.adapter for trial in members]):  # in the backward too: checkpointing runs it again
                losses_P = self._losses(noised, batch.conditioning, len(members)) / sums.num_samples
                scaled = [members[place].scaler.scale(losses_P[place]) for place in live]
                torch.stack(scaled).sum().backward()
            sums.losses[[self._rows[trial.name] for trial in members]] += losses_P.detach()
        if with_base:
            with torch.no_grad(), bank.disabled():
                sums.losses[-1] += self._losses(noised, batch.conditioning, 1)[0] / sums.num_samples
        sums.files += batch.files
        sums.draws.update(f"{noised.digest}{batch.files}".encode())

    def _losses(self, noised: NoisedLatents, conditioning: Conditioning, num_trials: int) -> torch.Tensor:
        """Sum of the weighted losses of a micro-batch [P], for each trial of the pass that acts."""
        return (self._denoiser.squared_errors(noised, conditioning, num_trials) * noised.weight_B).sum(1)

    def _reduce(self, losses: torch.Tensor, stop_asked: bool, refused: Sequence[str]) -> bool:
        """Sum gradients, losses and the wish to stop over all processes, in one flat tensor; in place.

        Memory that one of them was refused ends all.
        """
        if self._runtime.launch.num_processes == 1:
            self._runtime.raise_refusal("forward", refused)
            return stop_asked
        parameters = [p for trial in self.trials for p in trial.parameters.values()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        wishes = torch.tensor([float(stop_asked), float(len(refused))], device=losses.device)
        tensors = [*(p.grad for p in parameters if p.grad is not None), losses, wishes]
        flat = self._runtime.sum_over_processes(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
        stopping, are_refused = (wishes > 0).tolist()
        if are_refused:
            self._runtime.raise_refusal("forward", self._runtime.from_all(list(refused)))
        return stopping
