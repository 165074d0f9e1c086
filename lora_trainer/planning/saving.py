"""Settings that need less memory, as a person would type them, those that cost least first. Never imports torch.

A resume takes each of them: a batch split at equal global batch moves the last bits, which is said, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from lora_trainer.config.schema import RunConfig

Phase = Literal["loading", "encode", "forward", "optimizer", "probe", "sample", "checkpoint", "export"]
"""What a run does where it may ask for memory: read weights and caches, encode images and prompts, forward and
backward, optimizer step, forward of a probe, a sample image, save, write a LoRA."""


def saving_keys(
    config: RunConfig, phase: str, *, trials_per_pass: int | None = None, on_gpu: bool = False
) -> Iterator[tuple[str, ...]]:
    """Sets of overrides for the same command: each needs less memory in a phase than the one before it; maybe none.

    Args:
        trials_per_pass: how many a sweep packs; None is what the config says.
        on_gpu: half precision is worth its rounding there alone.
    """
    assert phase in get_args(Phase), phase
    train, said = config.train, tuple[str, ...]()
    if trials_per_pass is None and config.sweep is not None and config.sweep.trials_per_pass != "auto":
        trials_per_pass = config.sweep.trials_per_pass
    if phase in ("forward", "probe"):
        for said in _halved("sweep.trials_per_pass", trials_per_pass or 1):
            yield said
    packing = said
    if phase == "forward":
        for said in ((*packing, *split) for split in _splits(train.batch_size, train.gradient_accumulation_steps)):
            yield said
        if not train.gradient_checkpointing:
            yield (said := (*said, "train.gradient_checkpointing=true"))
    if phase == "probe" and config.validation is not None:
        for said in ((*packing, *fewer) for fewer in _halved("validation.batch_size", config.validation.batch_size)):
            yield said
    if phase in ("loading", "forward", "optimizer", "probe") and train.precision == "fp32" and on_gpu:
        allowed = ", ".join(dict.fromkeys([*config.resume.allow_changes, "train.precision"]))
        yield (*said, "train.precision=auto", f"resume.allow_changes=[{allowed}]")
    if phase == "sample" and config.sample.prompts:
        yield ("sample.prompts=[]",)


def _halved(key: str, number: int) -> Iterator[tuple[str, ...]]:
    """A count down to 1."""
    while number > 1:
        number //= 2
        yield (f"{key}={number}",)


def _splits(batch_size: int, accumulation: int) -> Iterator[tuple[str, ...]]:
    """The same product in smaller batches, each at most half of the one before."""
    product = batch_size * accumulation
    while batch_size > 1:
        batch_size = next(size for size in range(batch_size // 2, 0, -1) if product % size == 0)
        yield f"train.batch_size={batch_size}", f"train.gradient_accumulation_steps={product // batch_size}"
