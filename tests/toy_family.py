"""A model family that is unlike Stable Diffusion on purpose: all that another package writes to add one."""

from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from transformers import CLIPTextModel

from lora_trainer.models.clip import last_hidden_state
from lora_trainer.models.diffusers_family import DiffusersFamily
from lora_trainer.models.family import FileName

QKV = ("to_q", "to_k", "to_v")


class ToyTransformer(ModelMixin, ConfigMixin):
    """One block of attention over latents [B, C, h, w] and words, told the time, a summary and the image's size."""

    @register_to_config
    def __init__(self, channels: int = 16, width: int = 24, words: int = 16, summary: int = 8) -> None:
        super().__init__()
        self.proj_in, self.embed_words = nn.Linear(channels, width), nn.Linear(words, width)
        self.embed_rest, self.proj_out = nn.Linear(1 + summary + 2, width), nn.Linear(width, channels)
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in QKV})

    def forward(self, latents: Any, times: Any, words: Any, summary: Any, size: Any) -> Any:
        rest = torch.cat([times[:, None] / 1000, summary, size / 100], 1).to(words.dtype)
        pixels = self.proj_in(latents.flatten(2).transpose(1, 2))
        tokens = torch.cat([pixels, self.embed_words(words)], 1) + self.embed_rest(rest)[:, None]
        mixed = nn.functional.scaled_dot_product_attention(*(self.attention[name](tokens) for name in QKV))
        return self.proj_out((tokens + mixed)[:, : pixels.shape[1]]).transpose(1, 2).unflatten(2, latents.shape[2:])


class ToyFlow(DiffusersFamily):
    """Flow matching; two text encoders of different width; the image's size is told; q, k and v share a name."""

    name = "toy_flow"
    pipelines = ("ToyFlowPipeline",)
    models = ("transformer", "vae", "text_encoder", "text_encoder_2")
    others = ("tokenizer", "scheduler")
    denoiser = "transformer"
    prompt_components = ("tokenizer", "text_encoder", "text_encoder_2")
    prediction_types = ("flow",)
    target_presets: ClassVar = {"attention": QKV}
    kohya_version, architecture = "toy_flow", "toy-flow/lora"

    def kohya_names(self, layers: Any) -> Any:
        parted = {layer: layer.replace(".", "_").rpartition("_to_") for layer in layers}
        return {
            layer: FileName(f"lora_{block}_qkv", "qkv".index(last), 3) if block else FileName(f"lora_{last}")
            for layer, (block, _, last) in parted.items()
        }

    def view_conditioning(self, view: Any) -> Any:
        return {"size": tuple(map(float, view.original_size))}

    def load_text_encoders(self, device: Any) -> Any:
        return [self.load(CLIPTextModel, name, device, torch.float32) for name in self.models[2:]]

    def encode_prompt(self, encoders: Any, prompt: str) -> Any:
        words, others = (last_hidden_state(self.tokenizer, encoder, prompt) for encoder in encoders)
        return {"words": words, "summary": others.mean(0)}

    def load_denoiser(self, device: Any, dtype: Any) -> Any:
        return self.load(ToyTransformer, "transformer", device, dtype)

    def predict(self, denoiser: Any, noisy: Any, times: Any, told: Any) -> Any:
        return denoiser(noisy, times, told["words"], told["summary"], told["size"])

    def draw_latents(self, denoiser: Any, vae: AutoencoderKL, prompts: Any, settings: Any) -> Any:
        schedule = FlowMatchEulerDiscreteScheduler.from_config(self.base.component_config("scheduler"))
        schedule.set_timesteps(settings.num_inference_steps)
        side = settings.resolution // self.latent_factor
        latents = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(settings.seed))
        for time in schedule.timesteps:
            latents = schedule.step(self.predict(denoiser, latents, time[None], prompts[0]), time, latents)[0]
        return latents
