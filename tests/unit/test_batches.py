"""The order of an epoch: every record as often as it is repeated, shuffled by the epoch's stream."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_trainer.data.batches import BatchSource, LatentStore, PromptStore
from lora_trainer.data.records import Dataset, Record
from lora_trainer.diffusion import random_streams

REPEATS = (3, 1, 7, 2)
SEED = 5


def source(batch_size: int) -> BatchSource:
    records = tuple(
        Record(Path(f"{index}.png"), f"{index}.png", str(index), (8, 8), repeats, ("",))
        for index, repeats in enumerate(REPEATS)
    )
    blank = torch.zeros(len(REPEATS), 4, 1, 1)
    rows = {(index, 0, False): index for index in range(len(REPEATS))}
    return BatchSource(
        records=records,
        samples=Dataset(records, ()).samples(),
        latents=LatentStore(blank, blank, {}, rows, num_crops=1, flips=False),
        prompts=PromptStore({}, {"": 0}),
        seed=SEED,
        batch_size=batch_size,
        accumulation=1,
        num_processes=1,
        caption_dropout=0.0,
        device=torch.device("cpu"),
    )


def test_the_order_is_the_permutation_of_the_samples_written_out() -> None:
    batches = source(batch_size=4)
    written_out = [index for index, repeats in enumerate(REPEATS) for _ in range(repeats)]
    for epoch in range(3):
        updates = range(epoch * batches.updates_per_epoch, (epoch + 1) * batches.updates_per_epoch)
        slots = [slot for k in updates for slot in batches.slots_of(k, 0, 0)]
        order = random_streams.stream(SEED, "order", epoch).permutation(len(written_out)).tolist()
        assert batches.at(slots).files == tuple(f"{written_out[sample]}.png" for sample in order)
