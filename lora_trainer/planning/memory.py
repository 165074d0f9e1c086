"""How much memory a run takes, line by line, before the first tensor; and with which keys it fits. Never imports torch.

All figures of memory come from `estimate_memory`. What is counted is exact but for kernels and the allocator, which
have a line of their own, an allowance.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_trainer.config.load import check_source
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.source import Source, set_value, split_override
from lora_trainer.models.registry import open_family
from lora_trainer.models.unet_activations import AdaptedLayer, ForwardShape
from lora_trainer.planning.prepare import Prepared
from lora_trainer.planning.run_plan import lora_parameters
from lora_trainer.planning.saving import saving_keys
from lora_trainer.runtime.device import Device, Precision, precision_on

BYTES: Mapping[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
GPU_SHARE, HOST_SHARE, HOST_SHARE_OF_GPU = 768 * 2**20, 768 * 2**20, 2 * 2**30
"""Allowances: a GPU's context, kernels and the allocator's gaps; Python with torch on the host, and more for a GPU."""
WORKING_COPIES = 4
"""Of the largest tensor: gradients that a backward holds, or the widest layers of a VAE."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes."""

    lines: Mapping[str, int]
    """Of the device at the peak of training, by what holds them."""
    host: int
    """At its peak, the device's lines included where the host is the device."""

    def on(self, device: Device) -> int:
        """What must fit into the memory of the device."""
        return self.host if device.gpu is None else self.total

    @property
    def total(self) -> int:
        return sum(self.lines.values())


def estimate_memory(
    prepared: Prepared, config: RunConfig, device: Device, *, num_trials: int = 1, trials_per_pass: int = 1
) -> MemoryEstimate | None:
    """What a run like this one takes under a config on a device; None for a family that cannot tell.

    Args:
        config: the run's own, or one that differs in what only changes memory.
        num_trials: those of the group, all like this one.
        trials_per_pass: those that share a forward.
    """
    base, family, side, plan = prepared.base, open_family(prepared.base), config.data.resolution, prepared.plan
    size, adapter, rank = BYTES[precision_on(config.train.precision, device)], config.adapter, config.adapter.rank
    targets = prepared.target_shapes
    kept = family.kept_activations(
        {name: AdaptedLayer(rank, lora_parameters(shape, rank)) for name, shape in targets.items()},
        ForwardShape(
            batch_size=config.train.batch_size,
            latent_side=side // family.latent_factor,
            num_tokens=family.max_tokens,
            element_bytes=size,
            on_gpu=device.gpu is not None,
            num_trials=trials_per_pass,
            checkpointing=config.train.gradient_checkpointing,
            use_dora=adapter.use_dora,
            dropout=adapter.dropout > 0,
        ),
    )
    if kept is None:
        return None
    weights = 4 * num_trials * plan.num_parameters
    of_layers = [
        ((rank, *rest), (out, rank, *(1 for _ in rest[1:])), *([(out,)] * adapter.use_dora))
        for out, *rest in targets.values()
    ]
    state = sum(config.optimizer.state_values(shape) for shapes in of_layers for shape in shapes)
    lines = {
        "frozen base": size * base.num_weights(base.denoiser),
        "adapters": weights,
        "gradients": weights,
        "optimizer state": int(4 * num_trials * state),
        "moving average": weights if config.train.ema_decay is not None else 0,
        "saved activations": kept.by_forward + kept.recomputed,
    }
    vae, share = 4 * base.num_weights("vae"), GPU_SHARE if device.gpu else 0
    drawing = WORKING_COPIES * 4 * base.component_config("vae")["block_out_channels"][0] * 2 * side**2
    working = WORKING_COPIES * kept.largest
    held = sum(lines.values()) - lines["saved activations"] if config.sample.prompts else 0
    lines["encoding and samples, beyond that"] = max(0, held + vae + drawing - sum(lines.values()) - working)
    lines["runtime's own share (allowance)"] = share + working
    of_entry = family.entry_bytes(side)
    cache = sum(number * each for number, each in zip(prepared.num_entries, of_entry, strict=True))
    loading = sum(file.stat().st_size for file in base.weights(base.denoiser)) + lines["frozen base"]
    training = sum(lines.values()) if device.gpu is None else vae if config.sample.prompts else 0
    host = HOST_SHARE + (HOST_SHARE_OF_GPU if device.gpu else 0) + cache + max(cache, loading, training)
    return MemoryEstimate({name: number for name, number in lines.items() if number}, host)


def planned_peak_gib(prepared: Prepared, num_trials: int, trials_per_pass: int) -> float:
    """On its device; NaN for a family that cannot tell."""
    device = prepared.devices[0]
    estimate = estimate_memory(
        prepared, prepared.config, device, num_trials=num_trials, trials_per_pass=trials_per_pass
    )
    return math.nan if estimate is None else estimate.on(device) / 2**30


def memory_rows(prepared: Prepared, num_trials: int = 1, trials_per_pass: int = 1) -> Iterator[tuple[str, str]]:
    """Device, precision and memory in words, and what to do where it does not fit."""
    used, other = prepared.devices[0], prepared.devices[-1]
    host = used if used.gpu is None else other
    for device in (used, other) if other.why_unused else (used,):
        unused = f"; not used, as {device.why_unused}: what follows is as if it were" if device.why_unused else ""
        room = f"{_size(device.free_bytes)} of {_size(device.total_bytes)} free"
        yield "device", f"{device.name}, {room if device.total_bytes else 'whose memory is not told'}{unused}"
        asked = prepared.config.train.precision
        yield "precision", precision_on(asked, device) + (", which `auto` is here" if asked == "auto" else "")
        yield from _fit_rows(prepared, device, host, num_trials, trials_per_pass)


def _fit_rows(
    prepared: Prepared, device: Device, host: Device, num_trials: int, trials_per_pass: int
) -> Iterator[tuple[str, str]]:
    def estimate(config: RunConfig, per_pass: int = trials_per_pass) -> MemoryEstimate | None:
        return estimate_memory(prepared, config, device, num_trials=num_trials, trials_per_pass=per_pass)

    def fits(found: MemoryEstimate | None) -> bool:
        return found is not None and found.on(device) <= (device.free_bytes or math.inf)

    now = estimate(prepared.config)
    if now is None:
        yield "memory", "not counted for this family; --dry-run --measure measures it"
        return
    yield "memory", f"about {_size(now.total)}, an estimate"
    yield from (("", f"{_size(number)} {name}") for name, number in now.lines.items())
    yield "host memory", f"about {_size(now.host)} of {_size(host.free_bytes)} free"
    if fits(now):
        return
    yield "", f"warning: {_size(now.on(device))} do not fit into the {_size(device.free_bytes)} that are free"
    yield from (("", f"warning: {held}") for held in device.processes()[:3])
    tried: tuple[str, ...] = ()
    for tried in saving_keys(
        prepared.config, "forward", trials_per_pass=trials_per_pass, on_gpu=device.gpu is not None
    ):
        if fits(found := estimate(*_changed(prepared.config, tried, trials_per_pass))) and found is not None:
            yield "", f"it fits, in about {_size(found.on(device))}, with: {shlex.join(tried)}"
            return
    most = f" even with {shlex.join(tried)}" if tried else ""
    yield "", f"warning: it does not fit{most}: free the memory, or lower data.resolution, which shows most"


def _changed(config: RunConfig, words: Sequence[str], trials_per_pass: int) -> tuple[RunConfig, int]:
    """The config with these overrides, and the trials per pass that they ask for."""
    source, packing = Source(config.model_dump(mode="json")), "sweep.trials_per_pass="
    for word in words:
        if word.startswith(packing):
            trials_per_pass = int(word.removeprefix(packing))
        else:
            set_value(source, *split_override(word, None), None)
    return check_source(source), trials_per_pass


def _size(number: float) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
