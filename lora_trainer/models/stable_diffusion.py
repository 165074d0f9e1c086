"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet with cross-attention, a four-channel VAE."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lora_trainer.errors import Problem
from lora_trainer.models.clip import last_hidden_state
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
_WANTED: dict[str, dict[str, Any]] = {
    "unet": {
        **dict.fromkeys(("addition_embed_type", "class_embed_type", "encoder_hid_dim", "num_class_embeds")),
        **dict.fromkeys(("in_channels", "out_channels"), 4),
        **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), 3),
        **dict.fromkeys(("class_embeddings_concat", "dual_cross_attention", "only_cross_attention"), False),
        "act_fn": "silu",
        "freq_shift": 0,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "time_cond_proj_dim": None,
        "transformer_layers_per_block": 1,
        "_class_name": "UNet2DConditionModel",
    },
    "vae": {
        **dict.fromkeys(("in_channels", "out_channels"), 3),
        **dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), True),
        "_class_name": "AutoencoderKL",
        "latent_channels": 4,
        "shift_factor": None,
        "act_fn": "silu",
    },
}
"""What is the same in all bases of this family; where a config does not say it, it is so."""
_SIZES = {
    "unet": ("block_out_channels", "layers_per_block", "cross_attention_dim"),
    "vae": ("block_out_channels", "layers_per_block"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "max_position_embeddings"),
}
_LARGEST = {"layers_per_block": 64, "num_hidden_layers": 256}
"""Of a size; of others 2**17."""
_PARTS = (
    ("unet", "block_out_channels", "norm_num_groups", 32),
    ("unet", "block_out_channels", "attention_head_dim", 8),
    ("vae", "block_out_channels", "norm_num_groups", 32),
    ("text_encoder", "hidden_size", "num_attention_heads", 12),
)
"""Component, a width, into how many equal parts it is divided, and that number where it is not said."""
_LISTS = ("block_out_channels", "layers_per_block")
_COUNTED = re.compile(r"_blocks\.\d+\.resnets\.\d+\.conv1\.weight$")
"""A weight of each resnet, of which there are no more than the config says."""
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
        fix, found = "use the base's own folder", [*self._misfits()] or [*self._misshapen()]
        return [*super().problems(), *(Problem(what, str(self.base.path / where), fix=fix) for where, what in found)]

    def _configs(self) -> dict[str, dict[str, Any]]:
        return {component: self.base.component_config(component) for component in self.models}

    def _misfits(self) -> Iterator[tuple[str, str]]:
        """What makes the components another model than their index says: inpainting, SDXL, a foreign text encoder."""
        configs = self._configs()
        for component, key in ((component, key) for component, keys in _SIZES.items() for key in keys):
            value = configs[component].get(key)
            parts = value if isinstance(value, list) and key in _LISTS else [value]
            if not parts or not all(type(part) is int and 0 < part <= _LARGEST.get(key, 2**17) for part in parts):
                yield f"{component}/config.json", f"`{key}` is {value}, which is no size"
                return
        for component, key, divisor, usual in _PARTS:
            width, number = configs[component][key], configs[component].get(divisor, usual)
            sizes: list[int] = width if isinstance(width, list) else [width]
            numbers = number if isinstance(number, list) else [number] * len(sizes)
            fits = [type(n) is int and n > 0 and w % n == 0 for w, n in zip(sizes, numbers, strict=False)]
            if len(numbers) != len(sizes) or not all(fits):
                yield f"{component}/config.json", f"`{key}` is {width}, which `{divisor}` {number} does not divide"
        for component, key in ((part, f"{way}_block_types") for part in ("unet", "vae") for way in ("down", "up")):
            types, widths = (configs[component].get(name) for name in (key, "block_out_channels"))
            if not isinstance(types, list) or not isinstance(widths, list) or len(types) != len(widths):
                yield f"{component}/config.json", f"`{key}` is {types}, not as long as `block_out_channels`"
        value = configs["vae"].get("scaling_factor", 1)
        if not isinstance(value, float | int) or not 0 < value < 1000:
            yield "vae/config.json", f"`scaling_factor` is {value}, which is no number from 0 to 1000"
        width = configs["text_encoder"].get("hidden_size")
        for component, wanted in {**_WANTED, "unet": {**_WANTED["unet"], "cross_attention_dim": width}}.items():
            for key, usual in wanted.items():
                if (value := configs[component].get(key, usual)) != usual:
                    what = f"`{key}` is {value}, where Stable Diffusion 1.x and 2.x with these parts have {usual}"
                    yield f"{component}/config.json", what
        settings = read_object(self.base.path / "tokenizer" / "tokenizer_config.json")
        length = configs["text_encoder"].get("max_position_embeddings")
        if (said := settings.get("model_max_length", length)) != length:
            yield "tokenizer", f"`model_max_length` is {said}, but the text encoder has {length} positions"

    def _misshapen(self) -> Iterator[tuple[str, str]]:
        """Components whose weights are of another model than their configs, by its ends and biases."""
        unet, vae, encoder = self._configs().values()
        outer, width, widths = unet["block_out_channels"][0], encoder["hidden_size"], vae["block_out_channels"]
        ends: dict[str, dict[str, tuple[int, ...]]] = {
            "unet": {"conv_in": (outer, 4), "conv_out": (4, outer)} | _resnets(unet),
            "vae": {"encoder.conv_in": (widths[0], 3), "encoder.conv_out": (8, widths[-1])}
            | {"decoder.conv_in": (widths[-1], 4), "decoder.conv_out": (3, widths[0])}
            | _resnets(vae),
            "text_encoder": {
                "embeddings.token_embedding": (encoder.get("vocab_size"), width),
                "embeddings.position_embedding": (encoder["max_position_embeddings"], width),
            }
            | {f"layers.{layer}.mlp.fc1": () for layer in range(encoder["num_hidden_layers"])},
        }
        for component, wanted in ends.items():
            shapes = self.base.tensor_shapes(component)
            faults = [f"`{name}` is missing" for name in wanted if not any(_is(key, name) for key in shapes)]
            for key, shape in shapes.items():
                layer = key.removesuffix(".weight")
                fits = [shape[: len(start)] == start for name, start in wanted.items() if _is(key, name)]
                fits.append(bool(fits) or _COUNTED.search(key) is None)
                fits.append(key == layer or shapes.get(f"{layer}.bias", shape[:1]) == shape[:1])
                fits.append(not _is(key, "attn2.to_k") or shape[1] == width)
                if not all(fits):
                    faults.append(f"`{layer}` is {' x '.join(map(str, shape))}")
            if faults:
                yield component, f"{len(faults)} of its weights do not fit its config: {', '.join(faults[:3])}"

    @property
    def kohya_version(self) -> str:
        """SD 2.x is told by its wider text encoder."""
        if self.base.component_config("unet").get("cross_attention_dim") != 1024:
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
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
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


def _is(key: str, layer: str) -> bool:
    """Whether a tensor is the weight of a layer, whatever stands before its name."""
    return f".{key}".endswith(f".{layer}.weight")


def _resnets(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Outputs of the first convolution of each resnet; on the way up a block has one more."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    blocks = [*zip(widths, layers if isinstance(layers, list) else [layers] * len(widths), strict=False)]
    ways = ("down", blocks), ("up", [(width, num + 1) for width, num in reversed(blocks)])
    return {
        f"{way}_blocks.{index}.resnets.{layer}.conv1": (width,)
        for way, sized in ways
        for index, (width, num) in enumerate(sized)
        for layer in range(num)
    }
