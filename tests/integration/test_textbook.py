"""A run equals the loop that a textbook would write with the same libraries, fed with the same draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file

from lora_trainer.diffusion import random_streams
from lora_trainer.tracking.metrics import step_rows

pytestmark = pytest.mark.usefixtures("plain_pictures")

STEPS, BATCH, SEED, LR = 6, 2, 42, 1e-3


def textbook_loop(base: Path, images: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Encoders in the loop, AdamW, a cosine with warm-up, clipping at 1: as the diffusers example does it."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    unet, vae, text_encoder, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), unet, "default")
    trainable = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    for name, parameter in trainable.items():
        if "lora_A" in name:
            layer, bound = name.partition(".lora_A")[0], 1 / parameter.shape[1] ** 0.5
            parameter.data.copy_(random_streams.uniform(-bound, bound, parameter.shape, SEED, "adapter init", layer))
    optimizer = torch.optim.AdamW(trainable.values(), lr=LR, weight_decay=0.01)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    files = sorted(images.glob("*.png"))
    losses = []
    unet.train()
    for step in range(STEPS):
        epoch, position = divmod(step, len(files) // BATCH)
        order = random_streams.stream(SEED, "order", epoch).permutation(len(files))
        slots = range(position * BATCH, (position + 1) * BATCH)
        chosen = [files[order[slot]] for slot in slots]
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in chosen]) / 127.5 - 1
        captions = [f.with_suffix(".txt").read_text().strip() for f in chosen]
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
            shape = posterior.mean.shape[1:]
            jitter = torch.stack([random_streams.normal(shape, SEED, "latent", epoch, slot) for slot in slots])
            latents = (posterior.mean + posterior.std * jitter) * vae.config.scaling_factor
            tokens = tokenizer(captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
            prompt_embeds = text_encoder(tokens.input_ids)[0]
        noise = torch.stack([random_streams.normal(shape, SEED, "noise", epoch, slot) for slot in slots])
        timesteps = torch.tensor(
            [int(random_streams.stream(SEED, "timestep", epoch, slot).integers(1000)) for slot in slots]
        )
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, prompt_embeds).sample
        loss = torch.nn.functional.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return get_peft_model_state_dict(unet, adapter_name="default"), losses


@pytest.mark.quick
def test_a_run_equals_the_textbook_loop(train_toy: Callable[..., Path], toy_base: Path, toy_images: Path) -> None:
    run_dir = train_toy("export.dtype=fp32")
    weights, losses = textbook_loop(toy_base, toy_images)
    ours = load_file(run_dir / "diffusers" / "pytorch_lora_weights.safetensors")
    assert len(weights) == 32 * 2
    assert {f"unet.{name}" for name in weights} == set(ours)
    for name, tensor in weights.items():
        torch.testing.assert_close(ours[f"unet.{name}"], tensor, rtol=1e-4, atol=1e-6)
    rows = step_rows(run_dir / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
