"""What the families of diffusers folders have in common. torch is imported where a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from lora_trainer.errors import ModelError, Problem, TrainerError, refused_memory
from lora_trainer.models.clip import check_vocabulary
from lora_trainer.models.family import Family, FileName, View
from lora_trainer.models.folder import BaseFolder

if TYPE_CHECKING:
    import torch


class DiffusersFamily(Family):
    """A base that diffusers and transformers load: its VAE is an `AutoencoderKL`, its (first) tokenizer CLIP's."""

    kohya_prefixes: ClassVar[Mapping[str, str]]
    """What stands for each component in kohya's layout."""

    def __init__(self, base: BaseFolder) -> None:
        self.base = base

    def problems(self) -> list[Problem]:
        return check_vocabulary(self.base.path, lambda: self.tokenizer)

    @property
    def latent_factor(self) -> int:
        return 2 ** (len(self.base.component_config("vae")["block_out_channels"]) - 1)

    def kohya_names(self, layers: Iterable[str]) -> dict[str, FileName]:
        """The prefix and the layer's name with underscores for dots."""
        named = {}
        for layer in layers:
            component, _, rest = layer.partition(".")
            named[layer] = FileName(f"{self.kohya_prefixes[component]}_{rest.replace('.', '_')}")
        return named

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        length = self.base.component_config("text_encoder")["max_position_embeddings"]
        return CLIPTokenizer.from_pretrained(self.base.path / "tokenizer", model_max_length=length)

    @property
    def max_tokens(self) -> int:
        return self.tokenizer.model_max_length

    def count_tokens(self, prompt: str) -> int:
        return len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def readable(self, prompt: str) -> str:
        encoded = self.tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded.offset_mapping[1:-1]]
        return prompt[: max(ends[: self.max_tokens - 2], default=0)]

    def view_conditioning(self, view: View) -> dict[str, tuple[float, ...]]:
        return {}

    def entry_bytes(self, resolution: int) -> tuple[int, int]:
        """Mean and standard deviation of the latents, and the (first) encoder's hidden states, in fp32."""
        latents = self.base.component_config("vae")["latent_channels"] * (resolution // self.latent_factor) ** 2
        encoder = self.base.component_config("text_encoder")
        return 8 * latents, 4 * encoder["max_position_embeddings"] * encoder["hidden_size"]

    def load_vae(self, device: torch.device) -> Any:
        """The frozen VAE in fp32: SD's overflows in fp16 on some images."""
        import torch
        from diffusers import AutoencoderKL

        return self.load(AutoencoderKL, "vae", device, torch.float32)

    def encode_images(self, vae: Any, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled and shifted as the VAE's config says: (z - shift) x scale."""
        posterior, factor = vae.encode(pixels_BCHW).latent_dist, vae.config.scaling_factor
        return (posterior.mean - (vae.config.shift_factor or 0)) * factor, posterior.std * factor

    def decode(self, vae: Any, latents_BChw: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents_BChw / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample

    def load_pipeline(self) -> Any:
        what = f"there is no stock pipeline for the family {self.name}"
        raise ModelError(Problem(what, str(self.base.path), fix="use sample.prompts, which draws while it trains"))

    def load(self, model: Any, component: str, device: torch.device, dtype: torch.dtype) -> Any:
        """A component's frozen model.

        Raises:
            ModelError: it cannot be made of these files, lacks a weight, or a weight is not finite.
        """
        import torch
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        place, variant = self.base.path / component, self.base.variant(component)
        options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True, "variant": variant}
        try:
            loaded, told = model.from_pretrained(place, output_loading_info=True, **options)
        except Exception as error:  # whatever the libraries make of a config
            if isinstance(error, TrainerError) or refused_memory(error) is not None:  # a request to stop is one
                raise
            what, why = f"the {component} cannot be made of its config and weights", str(error).partition("\n")[0]
            raise ModelError(Problem(what, str(place), why, "fetch the base again")) from error
        if lacking := sorted(told["missing_keys"]):
            what = f"{len(lacking)} weights of the {component} are missing, as `{lacking[0]}`"
            raise ModelError(Problem(what, str(place), fix="fetch the base again"))
        for name, parameter in loaded.named_parameters():
            if not torch.isfinite(parameter).all():
                what = f"the {component}'s weight `{name}` holds NaN or infinite values"
                raise ModelError(Problem(what, fix="fetch the base again"))
        return loaded.requires_grad_(False).eval().to(device)
