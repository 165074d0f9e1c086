"""Latents and prompt embeddings, encoded once, kept by content, and checked at every use.

An entry's name is the hash of everything that shapes it: the image's bytes and framing, or the text, and the encoder's
weights. Each image is encoded alone, so an entry never depends on its neighbours. The folder may be deleted any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lora_trainer.config.places import cache_folder
from lora_trainer.config.schema import DataConfig, RunConfig
from lora_trainer.data.batches import LatentStore, PromptStore
from lora_trainer.data.holdout import Split
from lora_trainer.data.images import Framing, apply_frame, decode
from lora_trainer.data.records import Progress, Record
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import ProbeItems
from lora_trainer.errors import DataError, Problem
from lora_trainer.models.family import Family, View
from lora_trainer.runtime.runtime import Runtime
from lora_trainer.storage import safetensors_io

LAYOUT = "1"  # part of every entry's name: raise it when the way of encoding changes
DEFAULT_CROPS = 4


@dataclass(frozen=True)
class Cache:
    """All that the loop reads, in memory."""

    latents: LatentStore
    prompts: PromptStore
    probes: Mapping[str, ProbeItems]
    num_encoded: int
    """Entries that were not there before."""
    num_cut_captions: int


@dataclass(frozen=True, slots=True)
class _View:
    """One framing of one image."""

    record: Record
    mirrored: bool
    framing: Framing

    def key(self, encoder: str) -> str:
        """The entry's name, without its ending."""
        frame = (self.framing.scaled_size, self.framing.left, self.framing.top, self.framing.resolution)
        return _hash("latent", encoder, self.record.sha256, frame, self.mirrored)

    def told(self, family: Family) -> dict[str, tuple[float, ...]]:
        """What the denoiser is told of it."""
        own = self.framing
        return family.view_conditioning(View(self.record.size, own.scaled_size, own.left, own.top, own.resolution))


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
        DataError: captions are longer than the text encoder reads (policy `error`), or an image has no finite latents.
    """
    folder = cache_folder(config)
    watched = [record for records in split.probes.values() for record in records]
    num_cut = _check_lengths(config.data, family, [*split.training.records, *watched])
    texts = _texts(config, [*split.training.records, *watched])
    encoders = "".join(base_digests[component] for component in family.prompt_components)
    text_files = {text: folder / "prompts" / f"{_hash('prompt tensors', encoders, text)}.safetensors" for text in texts}
    training_views = _training_views(config, split.training.records)
    probe_views = {name: [_plain_view(config, r) for r in records] for name, records in split.probes.items()}
    views = dict.fromkeys([*training_views.values(), *(view for row in probe_views.values() for view in row)])
    view_files = {view: folder / "latents" / f"{view.key(base_digests['vae'])}.safetensors" for view in views}
    missing_texts = [text for text in _share(texts, runtime) if not _is_whole(text_files[text])]
    missing_views = [view for view in _share(list(views), runtime) if not _is_whole(view_files[view])]
    if missing_texts:
        _encode_texts(family, runtime, missing_texts, text_files, progress)
    if missing_views:
        _encode_views(family, runtime, missing_views, view_files, progress)
    runtime.wait_for_everyone()
    return Cache(
        latents=_read_latents(training_views, view_files, config.data, family, runtime),
        prompts=_read_prompts(texts, text_files, runtime),
        probes={name: _read_probe(row, view_files, family, runtime) for name, row in probe_views.items()},
        num_encoded=len(missing_texts) + len(missing_views),
        num_cut_captions=num_cut,
    )


def _texts(config: RunConfig, records: Sequence[Record]) -> list[str]:
    """Every prompt that a run may ask for: captions, the empty one, samples."""
    captions = (caption for record in records for caption in record.captions)
    samples = (text for p in config.sample.prompts for text in (p.prompt, p.negative_prompt))
    return list(dict.fromkeys(["", *captions, *samples]))


def _training_views(config: RunConfig, records: Sequence[Record]) -> dict[tuple[int, int, bool], _View]:
    """Every way in which a sample may be shown, by (record, crop, mirrored)."""
    data, views = config.data, {}
    for index, record in enumerate(records):
        for crop in range(num_crops(data)):
            place = (0.5, 0.5)
            if data.crop == "random":
                x, y = random_streams.stream(config.seed, "crop place", record.sha256, crop).random(2)
                place = (float(x), float(y))
            for mirrored in (False, True) if data.flip else (False,):
                views[index, crop, mirrored] = _View(record, mirrored, record.framing(data.resolution, place))
    return views


def _plain_view(config: RunConfig, record: Record) -> _View:
    """What a probe looks at: the centre, never mirrored."""
    return _View(record, False, record.framing(config.data.resolution))


def num_crops(data: DataConfig) -> int:
    """Cached places per image."""
    return 1 if data.crop == "center" else data.crops_per_image or DEFAULT_CROPS


def _check_lengths(data: DataConfig, family: Family, records: Sequence[Record]) -> int:
    """Number of captions that are cut; an error for each where the policy says so."""
    limit = family.max_tokens
    counts = [(record, family.count_tokens(caption)) for record in records for caption in record.captions]
    long = [(record, count) for record, count in counts if count > limit]
    if long and data.captions.too_long == "error":
        fix = "shorten it, or set data.captions.too_long: cut"
        raise DataError(
            *(
                Problem(f"the caption has {n - 2} tokens, the text encoder reads {limit - 2}", str(r.path), fix=fix)
                for r, n in long
            )
        )
    return len(long)


def _share(items: Sequence[Any], runtime: Runtime) -> list[Any]:
    """This process's part of the work."""
    return list(items[runtime.launch.rank :: runtime.launch.num_processes])


@torch.no_grad()
def _encode_texts(
    family: Family, runtime: Runtime, texts: Sequence[str], files: dict[str, Path], progress: Progress
) -> None:
    encoders = family.load_text_encoders(runtime.device)
    for text in progress(texts, "encoding prompts", len(texts)):
        tensors = {name: values.cpu() for name, values in family.encode_prompt(encoders, text).items()}
        if not all(torch.isfinite(values).all() for values in tensors.values()):
            fix = "check the base's text encoder"
            raise DataError(Problem("the prompt's embedding is not finite", repr(text), fix=fix))
        _write_entry(files[text], tensors)
    del encoders
    runtime.free_cached_memory()


@torch.no_grad()
def _encode_views(
    family: Family, runtime: Runtime, views: Sequence[_View], files: dict[_View, Path], progress: Progress
) -> None:
    vae = family.load_vae(runtime.device)
    for view in progress(views, "encoding images", len(views)):
        square = apply_frame(_image(view.record), view.framing, mirrored=view.mirrored)
        pixels_HWC = torch.from_numpy(square).to(runtime.device).float() / 127.5 - 1
        mean, std = family.encode_images(vae, pixels_HWC.permute(2, 0, 1)[None])
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            fix = "take the image out, or check the base's VAE"
            raise DataError(Problem("the image's latents are not finite", str(view.record.path), fix=fix))
        _write_entry(files[view], {"mean": mean[0].cpu(), "std": std[0].cpu()})
    del vae
    runtime.free_cached_memory()


def _image(record: Record) -> Any:
    data = record.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DataError(Problem("the image changed while the run was starting", str(record.path), fix="start again"))
    return decode(data)


def _read_latents(
    views: Mapping[tuple[int, int, bool], _View],
    files: Mapping[_View, Path],
    data: DataConfig,
    family: Family,
    runtime: Runtime,
) -> LatentStore:
    distinct = list(dict.fromkeys(views.values()))
    entries = [safetensors_io.load(files[view])[0] for view in distinct]
    rows = {view: row for row, view in enumerate(distinct)}
    both = [torch.stack([entry[name] for entry in entries]) for name in ("mean", "std")]
    mean_NChw, std_NChw = runtime.place(torch.stack(both))
    return LatentStore(
        mean_NChw=mean_NChw,
        std_NChw=std_NChw,
        view_tensors=_view_tensors(distinct, family, mean_NChw.device),
        rows={key: rows[view] for key, view in views.items()},
        num_crops=num_crops(data),
        flips=data.flip,
    )


def _read_probe(views: Sequence[_View], files: Mapping[_View, Path], family: Family, runtime: Runtime) -> ProbeItems:
    means = [safetensors_io.load(files[view])[0]["mean"] for view in views]
    return ProbeItems(
        names=tuple(view.record.name for view in views),
        keys=tuple(view.record.sha256 for view in views),
        latents_NChw=torch.stack(means).to(runtime.device),
        view_tensors=_view_tensors(views, family, runtime.device),
        prompts=tuple(view.record.captions[0] for view in views),
    )


def _view_tensors(views: Sequence[_View], family: Family, device: torch.device) -> dict[str, torch.Tensor]:
    """What the denoiser is told of N views: [N, ...] by name."""
    told = [view.told(family) for view in views]
    return {name: torch.tensor([own[name] for own in told], device=device) for name in told[0]}


def _read_prompts(texts: Sequence[str], files: dict[str, Path], runtime: Runtime) -> PromptStore:
    entries = [safetensors_io.load(files[text])[0] for text in texts]
    tensors = {name: runtime.place(torch.stack([entry[name] for entry in entries])) for name in entries[0]}
    return PromptStore(tensors, {text: row for row, text in enumerate(texts)})


def _write_entry(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors_io.save(file, tensors, {"content": safetensors_io.payload_sha256(tensors)})


def _is_whole(file: Path) -> bool:
    """Whether the entry is there and its content is what was written."""
    try:
        tensors, metadata = safetensors_io.load(file)
    except (SafetensorError, OSError):
        return False
    return metadata.get("content") == safetensors_io.payload_sha256(tensors)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([LAYOUT, *parts]).encode()).hexdigest()
