"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet with cross-attention, a four-channel VAE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lora_trainer.errors import Problem
from lora_trainer.models.clip import check_vocabulary, last_hidden_state
from lora_trainer.models.diffusers_family import DiffusersFamily
from lora_trainer.models.family import SampleSettings
from lora_trainer.models.folder import read_object
from lora_trainer.models.unet_activations import AdaptedLayer, ForwardShape, Kept, kept_activations

if TYPE_CHECKING:
    import torch

    from lora_trainer.diffusion.batch import Conditioning

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEEDFORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.*.conv", "upsamplers.*.conv")
_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
}


class StableDiffusion(DiffusersFamily):
    """Loads, encodes and predicts; holds no model longer than its caller does.

    The preset `transformer` is kohya's default (`LoRA` in sd-scripts), `transformer+resnet` its convolution extension
    (`LoCon`).
    """

    name = "sd"
    pipelines = ("StableDiffusionPipeline",)
    models = ("unet", "vae", "text_encoder")
    others = ("tokenizer", "scheduler")
    denoiser = "unet"
    prompt_components = ("tokenizer", "text_encoder")
    prediction_types = ("epsilon", "v_prediction")
    kohya_prefixes: ClassVar = {"unet": "lora_unet"}
    target_presets: ClassVar = {
        "attention": ATTENTION,
        "attention+feedforward": (*ATTENTION, *FEEDFORWARD),
        "transformer": (*ATTENTION, *FEEDFORWARD, *PROJECTIONS),
        "transformer+resnet": (*ATTENTION, *FEEDFORWARD, *PROJECTIONS, *RESNET),
    }

    def problems(self) -> list[Problem]:
        return [*check_vocabulary(self.base.path), *self._misfits()]

    def _misfits(self) -> Iterator[Problem]:
        """What makes the components another model than their index says: inpainting, SDXL, a foreign text encoder."""
        unet, vae, encoder = (self.base.component_config(component) for component in self.models)
        for where, config, key, wanted in (
            ("unet", unet, "in_channels", 4),
            ("unet", unet, "out_channels", 4),
            ("unet", unet, "addition_embed_type", None),
            ("unet", unet, "class_embed_type", None),
            ("unet", unet, "encoder_hid_dim", None),
            ("unet", unet, "cross_attention_dim", encoder.get("hidden_size")),
            ("vae", vae, "latent_channels", 4),
        ):
            if (value := config.get(key, wanted)) != wanted:
                what = f"`{key}` is {value}, where Stable Diffusion 1.x and 2.x with these parts have {wanted}"
                yield Problem(what, str(self.base.path / where / "config.json"), fix="use the base's own folder")
        settings = read_object(self.base.path / "tokenizer" / "tokenizer_config.json")
        length = encoder.get("max_position_embeddings")
        if (said := settings.get("model_max_length", length)) != length:
            what = f"`model_max_length` is {said}, but the text encoder has {length} positions"
            yield Problem(what, str(self.base.path / "tokenizer"), fix="fetch tokenizer and text_encoder of one base")

    @property
    def kohya_version(self) -> str:
        """SD 2.x is told by its wider text encoder."""
        if self.base.component_config("unet")["cross_attention_dim"] != 1024:
            return "sd_v1"
        return "sd_v2_v" if self.base.prediction_type() == "v_prediction" else "sd_v2"

    @property
    def architecture(self) -> str:
        return f"{_ARCHITECTURES[self.kohya_version]}/lora"

    def kept_activations(self, layers: Mapping[str, AdaptedLayer], shape: ForwardShape) -> Kept | None:
        return kept_activations(self.base.component_config("unet"), layers, shape)

    def load_text_encoders(self, device: torch.device) -> Any:
        import torch
        from transformers import CLIPTextModel

        return self.load(CLIPTextModel, "text_encoder", device, torch.float32)

    def encode_prompt(self, encoders: Any, prompt: str) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": last_hidden_state(self.tokenizer, encoders, prompt)}

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> Any:
        from diffusers import UNet2DConditionModel

        return self.load(UNet2DConditionModel, "unet", device, dtype)

    def predict(
        self, denoiser: Any, noisy_BChw: torch.Tensor, times_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return denoiser(noisy_BChw, times_B, conditioning["prompt_embeds"], return_dict=False)[0]

    def draw_latents(
        self, denoiser: Any, vae: Any, prompts: tuple[Conditioning, Conditioning], settings: SampleSettings
    ) -> torch.Tensor:
        """By DDIM."""
        import torch
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        schedule, prediction_type = self.base.component_config("scheduler"), settings.prediction_type
        scheduler = DDIMScheduler.from_config(schedule, prediction_type=prediction_type)
        absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        pipeline = StableDiffusionPipeline(
            vae=vae, unet=denoiser, scheduler=scheduler, **absent, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        cond, uncond = prompts
        return pipeline(
            prompt_embeds=cond["prompt_embeds"],
            negative_prompt_embeds=uncond["prompt_embeds"],
            height=settings.resolution,
            width=settings.resolution,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(settings.seed),
            output_type="latent",
        ).images

    def load_pipeline(self) -> Any:
        import torch
        from diffusers import StableDiffusionPipeline

        host = torch.device("cpu")
        return StableDiffusionPipeline.from_pretrained(
            self.base.path,
            unet=self.load_denoiser(host, torch.float32),
            vae=self.load_vae(host),
            tokenizer=self.tokenizer,
            text_encoder=self.load_text_encoders(host),
            safety_checker=None,
            requires_safety_checker=False,
        )
