"""Three ways to take the same training step on the demo base: ours, and a plain diffusers loop with and without caches.

The plain step is written after the diffusers text-to-image LoRA example: VAE and text encoder in the loop, peft
adapters, AdamW, clipping, an LR scheduler from diffusers. All arms see the same samples, noise and timesteps, so their
losses must agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig as PeftLoraConfig
from PIL import Image

from lora_trainer.config.schema import RunConfig
from lora_trainer.diffusion import random_streams
from lora_trainer.diffusion.batch import Slot
from lora_trainer.planning.prepare import Prepared
from lora_trainer.runtime.runtime import Runtime
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.group import solo_group
from lora_trainer.training.setup import set_up


class Arm(Protocol):
    """One way to train."""

    name: str

    def step(self, number: int) -> float:
        """Take step `number` (0-based); its loss."""
        ...


class Ours:
    """The product's own step, set up as `fit` does."""

    name = "ours"

    def __init__(self, prepared: Prepared, runtime: Runtime) -> None:
        setup = set_up(solo_group(prepared), runtime, MainConsole(silent=True), trials_per_pass=1)
        self.trial, self.optimizer_step = prepared.config.name, setup.optimizer_step

    def step(self, number: int) -> float:
        return self.optimizer_step.run(number, stop_asked=False).trials[self.trial].loss


class Plain:
    """A diffusers-style loop; `cached` encodes images and captions once, before it starts."""

    def __init__(self, prepared: Prepared, device: torch.device, *, cached: bool) -> None:
        self.name = "diffusers style, cached" if cached else "diffusers style, encoders in the loop"
        self.config: RunConfig = prepared.config
        self.records, self.device, self.cached = prepared.dataset.records, device, cached
        pipeline = StableDiffusionPipeline.from_pretrained(prepared.base.path, safety_checker=None).to(device)
        self.unet, self.vae, self.text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        self.tokenizer = pipeline.tokenizer
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        for model in (self.unet, self.vae, self.text_encoder):
            model.requires_grad_(False)
        adapter = self.config.adapter
        targets = list(prepared.target_shapes)
        self.unet.add_adapter(PeftLoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=targets))
        self.trainable = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        for name, parameter in self.trainable.items():
            if ".lora_A." in name:
                bound, layer = 1 / parameter[0].numel() ** 0.5, name.partition(".lora_A.")[0]
                drawn = random_streams.uniform(-bound, bound, parameter.shape, self.config.seed, "adapter init", layer)
                parameter.data.copy_(drawn)
        options = self.config.optimizer
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=options.lr, weight_decay=options.weight_decay)
        self.lr_scheduler = get_scheduler(
            self.config.lr_scheduler.type,
            self.optimizer,
            num_warmup_steps=prepared.plan.param_groups[0].num_warmup_steps,
            num_training_steps=prepared.plan.num_steps,
        )
        self.unet.train()
        self.encoded = [self.encode([index]) for index in range(len(self.records))] if cached else []

    def step(self, number: int) -> float:
        batch, seed = self.config.train.batch_size, self.config.seed
        per_epoch = -(-len(self.records) // batch)
        epoch, position = divmod(number, per_epoch)
        order = random_streams.stream(seed, "order", epoch).permutation(len(self.records))
        slots = [Slot(epoch, n) for n in range(position * batch, min((position + 1) * batch, len(self.records)))]
        chosen = [int(order[slot.position]) for slot in slots]
        if self.cached:
            mean, std, prompt_embeds = (
                torch.cat(parts) for parts in zip(*(self.encoded[i] for i in chosen), strict=True)
            )
        else:
            mean, std, prompt_embeds = self.encode(chosen)
        shape = mean.shape[1:]
        jitter = torch.stack([random_streams.normal(shape, seed, "latent", *slot) for slot in slots]).to(self.device)
        latents = (mean + std * jitter) * self.vae.config.scaling_factor
        noise = torch.stack([random_streams.normal(shape, seed, "noise", *slot) for slot in slots]).to(self.device)
        drawn = [int(random_streams.stream(seed, "timestep", *slot).integers(1000)) for slot in slots]
        timesteps = torch.tensor(drawn, device=self.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, prompt_embeds).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.config.train.max_grad_norm or 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def encode(self, chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Posterior mean and deviation of the images, decoded from their files, and their prompt embeddings."""
        pixels = [np.asarray(Image.open(Path(self.records[i].path)).convert("RGB")) for i in chosen]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(self.device) / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        tokens = self.tokenizer(
            [self.records[i].captions[0] for i in chosen],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return posterior.mean, posterior.std, self.text_encoder(tokens.input_ids.to(self.device))[0]
