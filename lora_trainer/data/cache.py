"""Latents and prompt embeddings, encoded once, kept by content, and checked at every use.

An entry's name is the hash of everything that shapes it: the image's bytes and framing, or the text, and the encoder's
weights. Each image is encoded alone, so an entry never depends on its neighbours. The folder may be deleted any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lora_trainer.config.schema import DataConfig, RunConfig
from lora_trainer.data.batches import LatentStore, PromptStore
from lora_trainer.data.entries import Framed, entries_of, num_crops
from lora_trainer.data.holdout import Split
from lora_trainer.data.records import Progress
from lora_trainer.diffusion.batch import ProbeItems
from lora_trainer.errors import DataError, Problem
from lora_trainer.models.family import Family
from lora_trainer.runtime.runtime import Runtime
from lora_trainer.storage import safetensors_io


@dataclass(frozen=True)
class Cache:
    """All that the loop reads, in memory."""

    latents: LatentStore
    prompts: PromptStore
    probes: Mapping[str, ProbeItems]
    num_encoded: int
    """Entries that were not there before."""


def build_cache(
    config: RunConfig,
    family: Family,
    split: Split,
    base_digests: Mapping[str, str],
    runtime: Runtime,
    *,
    progress: Progress,
) -> Cache:
    """Encode what is missing, free the encoders, and read everything into memory.

    `base_digests` are the contents of the base's components: an entry belongs to one encoder's weights.
    With several processes each encodes its share; all read the whole.

    Raises:
        DataError: an image has no finite latents.
        OutOfMemory: what is encoded by then stays.
    """
    entries = entries_of(config, family, split.training.records, split.probes, base_digests)
    texts, images = entries.texts, entries.images
    missing_texts, missing_images = _missing(texts, runtime), _missing(images, runtime)
    with runtime.phase("encode", together=True):  # one image at a time: there is no setting that would need less
        if missing_texts:
            _encode_texts(family, runtime, missing_texts, texts, progress)
        if missing_images:
            _encode_views(family, runtime, missing_images, images, progress)
    with runtime.phase("loading", together=True):
        prompts = {name: runtime.place(values) for name, values in _stacked(texts.values()).items()}
        return Cache(
            latents=_read_latents(entries.training, images, config.data, family, runtime),
            prompts=PromptStore(prompts, {text: row for row, text in enumerate(texts)}),
            probes={name: _read_probe(row, images, family, runtime) for name, row in entries.probes.items()},
            num_encoded=len(missing_texts) + len(missing_images),
        )


def _missing(files: Mapping[Any, Path], runtime: Runtime) -> list[Any]:
    """Of this process's share of the work, what has no whole entry in its file."""
    share = list(files)[runtime.launch.rank :: runtime.launch.num_processes]
    return [item for item in share if not _is_whole(files[item])]


@torch.no_grad()
def _encode_texts(
    family: Family, runtime: Runtime, texts: Sequence[str], files: Mapping[str, Path], progress: Progress
) -> None:
    encoders = family.load_text_encoders(runtime.device)
    for text in progress(texts, "encoding prompts", len(texts)):
        fix = "check the base's text encoder"
        fault = Problem("the prompt's embedding is not finite", repr(text), fix=fix)
        _write_entry(files[text], family.encode_prompt(encoders, text), fault)
    del encoders
    runtime.free_cached_memory()


@torch.no_grad()
def _encode_views(
    family: Family, runtime: Runtime, images: Sequence[Framed], files: Mapping[Framed, Path], progress: Progress
) -> None:
    vae = family.load_vae(runtime.device)
    for image in progress(images, "encoding images", len(images)):
        pixels_HWC = torch.from_numpy(image.pixels()).to(runtime.device).float() / 127.5 - 1
        mean, std = family.encode_images(vae, pixels_HWC.permute(2, 0, 1)[None])
        fix = "take the image out, or check the base's VAE"
        fault = Problem("the image's latents are not finite", str(image.record.path), fix=fix)
        _write_entry(files[image], {"mean": mean[0], "std": std[0]}, fault)
    del vae
    runtime.free_cached_memory()


def _write_entry(file: Path, tensors: Mapping[str, torch.Tensor], fault: Problem) -> None:
    """Write an entry; where a value is not finite, the fault is raised as a DataError."""
    if not all(torch.isfinite(values).all() for values in tensors.values()):
        raise DataError(fault)
    safetensors_io.save(file, tensors, {"content": safetensors_io.payload_sha256(tensors)})


def _is_whole(file: Path) -> bool:
    """Whether the entry is there and its content is what was written."""
    try:
        tensors, metadata = safetensors_io.load(file)
    except (SafetensorError, OSError):
        return False
    return metadata.get("content") == safetensors_io.payload_sha256(tensors)


def _stacked(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """The tensors of N entries: [N, ...] by name."""
    entries = [safetensors_io.load(file)[0] for file in files]
    return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}


def _read_latents(
    images: Mapping[tuple[int, int, bool], Framed],
    files: Mapping[Framed, Path],
    data: DataConfig,
    family: Family,
    runtime: Runtime,
) -> LatentStore:
    rows = {image: row for row, image in enumerate(dict.fromkeys(images.values()))}
    latents = _stacked(files[image] for image in rows)
    mean_NChw, std_NChw = runtime.place(torch.stack([latents["mean"], latents["std"]]))
    return LatentStore(
        mean_NChw=mean_NChw,
        std_NChw=std_NChw,
        view_tensors=_view_tensors(rows, family, mean_NChw.device),
        rows={key: rows[image] for key, image in images.items()},
        num_crops=num_crops(data),
        flips=data.flip,
    )


def _read_probe(images: Sequence[Framed], files: Mapping[Framed, Path], family: Family, runtime: Runtime) -> ProbeItems:
    return ProbeItems(
        keys=tuple(image.record.sha256 for image in images),
        latents_NChw=_stacked(files[image] for image in images)["mean"].to(runtime.device),
        view_tensors=_view_tensors(images, family, runtime.device),
        prompts=tuple(image.record.captions[0] for image in images),
    )


def _view_tensors(images: Iterable[Framed], family: Family, device: torch.device) -> dict[str, torch.Tensor]:
    """What the denoiser is told of N views: [N, ...] by name."""
    values = [family.view_conditioning(image.view) for image in images]
    return {name: torch.tensor([row[name] for row in values], device=device) for name in values[0]}
