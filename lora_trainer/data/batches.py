"""Which sample stands in which slot, and what it looks like this time: all of it a function of the counters.

Update u of a run takes the global slots [uG, uG + G) of its epoch; process r takes, in micro-step a, the B slots from
(a P + r) B on. Order, crop, flip, caption and caption dropout are keyed by (seed, purpose, epoch, slot).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from lora_trainer.data.records import Record, Samples
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Batch, Conditioning, Slot


@dataclass(frozen=True)
class LatentStore:
    """Cached latents of every framing of every record: one row each."""

    mean_NChw: torch.Tensor
    std_NChw: torch.Tensor
    view_tensors: Mapping[str, torch.Tensor]
    """[N, ...] by name: what the denoiser is told of each view."""
    rows: Mapping[tuple[int, int, bool], int]
    """Row of (record, crop, mirrored)."""
    num_crops: int
    flips: bool


@dataclass(frozen=True)
class PromptStore:
    """Cached embeddings of T texts."""

    tensors: Mapping[str, torch.Tensor]
    """[T, ...] by name."""
    rows: Mapping[str, int]

    def conditioning(
        self, prompts: Sequence[str], view_tensors: Mapping[str, torch.Tensor], device: torch.device
    ) -> Conditioning:
        """What the denoiser is told of B prompts and, [B, ...] by name, of as many views."""
        rows = [self.rows[prompt] for prompt in prompts]
        of_prompts = {name: values[torch.tensor(rows, device=values.device)] for name, values in self.tensors.items()}
        tensors = {**of_prompts, **view_tensors}
        return Conditioning({name: values.to(device, non_blocking=True) for name, values in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Micro-batches by (update, micro-step, process), read from the caches."""

    records: Sequence[Record]
    samples: Samples
    latents: LatentStore
    prompts: PromptStore
    seed: int
    batch_size: int
    accumulation: int
    num_processes: int
    caption_dropout: float
    device: torch.device

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.num_processes

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.samples) // self.global_batch)

    def num_samples_of(self, k: int) -> int:
        """Real samples of update k over all processes: the last of an epoch may have fewer than G."""
        position = k % self.updates_per_epoch
        return min(self.global_batch, len(self.samples) - position * self.global_batch)

    def slots_of(self, k: int, micro_step: int, rank: int) -> list[Slot]:
        """The slots of one micro-batch; empty where the epoch's last update has no sample for it."""
        epoch, position = divmod(k, self.updates_per_epoch)
        first = position * self.global_batch + (micro_step * self.num_processes + rank) * self.batch_size
        return [Slot(epoch, index) for index in range(first, min(first + self.batch_size, len(self.samples)))]

    def at(self, slots: Sequence[Slot]) -> Batch:
        """The batch of these slots, on the device."""
        records, rows, prompts = zip(*(self._choose(slot) for slot in slots), strict=True)
        latents, rows_B = self.latents, torch.tensor(rows, device=self.latents.mean_NChw.device)
        mean = latents.mean_NChw[rows_B].to(self.device, non_blocking=True)
        std = latents.std_NChw[rows_B].to(self.device, non_blocking=True)
        views = {name: values[rows_B] for name, values in latents.view_tensors.items()}
        jitter = torch.stack([random_streams.normal(mean.shape[1:], self.seed, "latent", *slot) for slot in slots])
        return Batch(
            latents_BChw=mean + std * jitter.to(self.device, non_blocking=True),
            conditioning=self.prompts.conditioning(prompts, views, self.device),
            slots=tuple(slots),
            files=tuple(record.name for record in records),
        )

    def _choose(self, slot: Slot) -> tuple[Record, int, str]:
        """What one slot shows: the record, the row of its latents and the prompt."""
        index = self.samples[_order(self.seed, slot.epoch, len(self.samples))[slot.position]]
        crop = self._integer("crop", slot, self.latents.num_crops)
        mirrored = self.latents.flips and self._integer("flip", slot, 2) == 1
        captions = self.records[index].captions
        prompt = captions[self._integer("caption", slot, len(captions))]
        if self.caption_dropout:
            dropped = random_streams.stream(self.seed, "caption dropout", *slot).random() < self.caption_dropout
            prompt = "" if dropped else prompt
        return self.records[index], self.latents.rows[index, crop, mirrored], prompt

    def _integer(self, purpose: str, slot: Slot, bound: int) -> int:
        return 0 if bound == 1 else int(random_streams.stream(self.seed, purpose, *slot).integers(bound))


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The places of an epoch's samples, shuffled."""
    return random_streams.stream(seed, "order", epoch).permutation(num_samples)
