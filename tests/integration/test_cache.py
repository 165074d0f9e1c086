"""Encoded once, kept by content, checked at every use; and equal to encoding afresh."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from lora_trainer.data import cache as cache_module
from lora_trainer.errors import DataError
from lora_trainer.storage.safetensors_io import load


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from toys import write_images

    return write_images(tmp_path / "own", num=3)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What gets encoded, by kind."""
    seen: list[str] = []
    honest_views, honest_texts = cache_module._encode_views, cache_module._encode_texts

    def views(family: object, runtime: object, missing: list, *rest: object) -> None:
        seen.extend("image" for _ in missing)
        honest_views(family, runtime, missing, *rest)

    def texts(family: object, runtime: object, missing: list, *rest: object) -> None:
        seen.extend("text" for _ in missing)
        honest_texts(family, runtime, missing, *rest)

    monkeypatch.setattr(cache_module, "_encode_views", views)
    monkeypatch.setattr(cache_module, "_encode_texts", texts)
    return seen


def test_cached_equals_fresh(train_toy: Callable[..., Path], images: Path, toy_base: Path, tmp_path: Path) -> None:
    train_toy(f"data.dir={images}", "train.max_steps=3")
    pipeline = StableDiffusionPipeline.from_pretrained(toy_base, safety_checker=None)
    files = sorted((tmp_path / "runs" / ".cache" / "latents").iterdir())
    cached = {hashlib.sha256(load(f)[0]["mean"].numpy().tobytes()).hexdigest(): load(f)[0] for f in files}
    assert len(cached) == 3
    for file in sorted(images.glob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels).latent_dist
        factor = pipeline.vae.config.scaling_factor
        distances = [float((entry["mean"] - posterior.mean[0] * factor).abs().max()) for entry in cached.values()]
        nearest = list(cached.values())[int(np.argmin(distances))]
        torch.testing.assert_close(nearest["mean"], posterior.mean[0] * factor, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(nearest["std"], posterior.std[0] * factor, rtol=1e-5, atol=1e-6)
    prompts = [load(f)[0]["prompt_embeds"] for f in (tmp_path / "runs" / ".cache" / "prompts").iterdir()]
    assert len(prompts) == 4
    fresh, _ = pipeline.encode_prompt("picture 1", "cpu", 1, False)
    assert min(float((embeds - fresh[0]).abs().max()) for embeds in prompts) < 1e-6


def test_only_what_changed_is_encoded_again(train_toy: Callable[..., Path], images: Path, encoded: list[str]) -> None:
    def run(name: str, *overrides: str) -> list[str]:
        encoded.clear()
        train_toy(f"data.dir={images}", "train.max_steps=3", *overrides, name=name)
        return sorted(encoded)

    assert run("first") == ["image"] * 3 + ["text"] * 4
    assert run("again") == []
    for ending in (".png", ".txt"):
        (images / f"00{ending}").rename(images / f"renamed{ending}")
    assert run("renamed") == []
    (images / "01.txt").write_text("another caption")
    assert run("caption") == ["text"]
    stat = (images / "02.png").stat()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(images / "02.png")
    os.utime(images / "02.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run("pixels") == ["image"]
    assert run("flip", "data.flip=true") == ["image"] * 3
    assert run("size", "data.resolution=32") == ["image"] * 3
    assert run("crop", "data.crop=random", "data.crops_per_image=2", "data.resolution=32") == []  # square pictures
    assert run("prompt", "sample={prompts: [new], num_inference_steps: 1}") == ["text"]


def test_random_crops_are_cached_in_several_places(
    train_toy: Callable[..., Path], tmp_path: Path, encoded: list[str]
) -> None:
    from toys import write_images

    wide = write_images(tmp_path / "wide", num=2, size=(128, 64))
    train_toy(f"data.dir={wide}", "data.crop=random", "data.crops_per_image=3", "train.max_steps=3")
    assert encoded.count("image") == 6


def test_damaged_entries_are_encoded_again(
    train_toy: Callable[..., Path], images: Path, encoded: list[str], tmp_path: Path
) -> None:
    straight = train_toy(f"data.dir={images}", "train.max_steps=3", name="toy")
    straight = straight.rename(straight.with_name("straight"))
    first, second, _ = sorted((tmp_path / "runs" / ".cache" / "latents").iterdir())
    first.write_bytes(first.read_bytes()[:-10])
    raw = bytearray(second.read_bytes())
    raw[-1] ^= 1
    second.write_bytes(raw)
    encoded.clear()
    again = train_toy(f"data.dir={images}", "train.max_steps=3", name="toy")
    assert encoded == ["image"] * 2
    assert (again / "toy.safetensors").read_bytes() == (straight / "toy.safetensors").read_bytes()


def test_long_captions_are_refused_or_cut_and_counted(
    train_toy: Callable[..., Path], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "00.txt").write_text("a caption of far too many letters")
    with pytest.raises(DataError, match=r"has 27 tokens, the text encoder reads 14"):
        train_toy(f"data.dir={images}")
    train_toy(f"data.dir={images}", "data.captions.too_long=cut", "train.max_steps=3")
    assert "1 captions are longer" in capsys.readouterr().out


def test_latents_that_are_not_finite_name_the_image(
    train_toy: Callable[..., Path], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_trainer.models.stable_diffusion import StableDiffusion

    nan = torch.full((1, 4, 8, 8), float("nan"))
    monkeypatch.setattr(StableDiffusion, "encode_images", lambda *_: (nan, nan))
    with pytest.raises(DataError, match=r"00\.png: the image's latents are not finite"):
        train_toy(f"data.dir={images}")
