"""Small real things to test with: a Stable Diffusion of a few thousand parameters, and image folders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 16
MAX_TOKENS = 16
WATCHED = "validation={fraction: 0.34, every_steps: 3, max_cost: 1.0}"
"""An override that holds out a third of `write_images`."""


def toy_unet() -> UNet2DConditionModel:
    """A UNet with every kind of layer that an SD UNet has: attention, feed-forward, resnets, up- and downsampling."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def toy_tokenizer() -> CLIPTokenizer:
    """Bytes only: every letter is a token."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=MAX_TOKENS)


def tiny_unet() -> UNet2DConditionModel:
    """The smallest UNet with cross-attention: for tests that train hundreds of times."""
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def toy_text_encoder(width: int = TEXT_WIDTH) -> CLIPTextModel:
    """Two layers over the tokens of `toy_tokenizer`."""
    tokenizer = toy_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def toy_vae(latent_channels: int = 4, **options: float) -> AutoencoderKL:
    """Eight pixels per latent."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        **options,
    )


def build_toy_base(
    folder: Path, prediction_type: str = "epsilon", unet: Callable[[], UNet2DConditionModel] = toy_unet
) -> Path:
    """Save a random-weight Stable Diffusion as a diffusers folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = toy_vae()
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=toy_text_encoder(),
            tokenizer=toy_tokenizer(),
            unet=unet(),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction_type,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def build_flow_base(folder: Path) -> Path:
    """Save a random-weight base of the family in toy_family.py as a diffusers folder."""
    from toy_family import ToyTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components = {
            "transformer": ToyTransformer(),
            "vae": toy_vae(16, scaling_factor=0.7, shift_factor=0.1),
            "text_encoder": toy_text_encoder(),
            "text_encoder_2": toy_text_encoder(8),
            "tokenizer": toy_tokenizer(),
            "scheduler": FlowMatchEulerDiscreteScheduler(),
        }
    for name, component in components.items():
        component.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyFlowPipeline"}))
    return folder


def write_images(folder: Path, num: int = 6, size: tuple[int, int] = (64, 64), captions: bool = True) -> Path:
    """Seeded pictures with captions `picture 0` ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num):
        pixels = np.random.default_rng(index).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(folder / f"{index:02d}.png")
        if captions:
            (folder / f"{index:02d}.txt").write_text(f"picture {index}\n")
    return folder


def write_plain_pictures(patch: Callable[[Any, str, Any], object]) -> None:
    """Let matplotlib write files of one pixel. `patch` sets an attribute: that of a `monkeypatch`, or `setattr`."""

    def print_png(_: FigureCanvasAgg, file: io.BytesIO, **__: Any) -> None:
        Image.new("RGB", (1, 1)).save(file, "PNG")

    def print_svg(_: FigureCanvasSVG, file: io.StringIO, **__: Any) -> None:
        file.write('<svg viewBox="0 0 1 1"></svg>')

    patch(FigureCanvasAgg, "print_png", print_png)
    patch(FigureCanvasSVG, "print_svg", print_svg)
