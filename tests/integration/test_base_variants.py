"""Bases that were saved as diffusers' fp16 variant train and sample as the full ones do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lora_trainer.cli.export import convert_file, export_run
from lora_trainer.cli.sample import SampleRequest, sample
from lora_trainer.models.registry import open_base, open_family

Train = Callable[..., Path]
HALVES = {"whole": {}, "sharded": {"max_shard_size": "20KB"}}
REQUEST = SampleRequest(("a cat",), "", 0, 1, 2, 7.5, 1.0, 64)


@pytest.fixture(params=[*HALVES, "mixed"])
def half_base(request: pytest.FixtureRequest, toy_base: Path, tmp_path: Path) -> Path:
    """The toy base in fp16 alone: whole, in shards, or of its UNet alone."""
    folder = tmp_path / "half"
    pipeline = StableDiffusionPipeline.from_pretrained(toy_base, dtype=torch.float16)
    pipeline.save_pretrained(folder, variant="fp16", **HALVES.get(request.param, {}))
    if request.param == "mixed":
        for component in ("vae", "text_encoder"):  # the VAE has both: the full one counts
            shutil.copytree(toy_base / component, folder / component, dirs_exist_ok=True)
        (folder / "text_encoder" / "model.fp16.safetensors").unlink()
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    return folder


def test_an_fp16_variant_trains_and_samples(train_toy: Train, half_base: Path, tmp_path: Path) -> None:
    short = ("train.max_steps=1", "lr_scheduler={type: constant}", "sample={prompts: [x], num_inference_steps: 1}")
    halved = train_toy(*short, f"model.path={half_base}", name="half")
    full = train_toy(*short, name="full")
    tensors = [load_file(run / f"{run.name}.safetensors") for run in (halved, full)]
    assert tensors[0].keys() == tensors[1].keys()
    assert sample(halved / "half.safetensors", None, None, REQUEST, tmp_path / "drawn")[0].is_file()
    convert_file(halved / "half.safetensors", "diffusers", "fp16", None, tmp_path / "other.safetensors")
    export_run(halved, None, "kohya", "fp16", "exported", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (halved / "half.safetensors").read_bytes()


def test_its_encoders_and_denoiser_are_the_full_ones_rounded(toy_base: Path, half_base: Path) -> None:
    families = [open_family(open_base(str(base))) for base in (toy_base, half_base)]
    cpu = torch.device("cpu")
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = [family.encode_images(family.load_vae(cpu), pixels)[0] for family in families]
    encoded = [family.encode_prompt(family.load_text_encoders(cpu), "a cat") for family in families]
    texts = [own["prompt_embeds"][None] for own in encoded]
    noisy, step = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    noise = [
        family.load_denoiser(cpu, torch.float32)(noisy, step, text).sample
        for family, text in zip(families, texts, strict=True)
    ]
    for full, half in (latents, texts, noise):
        torch.testing.assert_close(half, full, rtol=0, atol=1e-2)
