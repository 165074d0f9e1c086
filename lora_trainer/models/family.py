"""What a model family is: all that only its kind of base knows. The first half of a family never loads torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lora_trainer.errors import ConfigError, Problem
from lora_trainer.models.folder import BaseFolder

if TYPE_CHECKING:
    import torch

    from lora_trainer.diffusion.batch import Conditioning
    from lora_trainer.models.unet_activations import AdaptedLayer, ForwardShape, Kept


@dataclass(frozen=True, slots=True)
class View:
    """How an image is shown to the model, px: its own size, the size that it is scaled to, and the square cut out."""

    original_size: tuple[int, int]
    scaled_size: tuple[int, int]
    left: int
    top: int
    resolution: int


@dataclass(frozen=True, slots=True)
class FileName:
    """What a layer is called in a LoRA file; a file may join several layers (q, k and v) under one name."""

    name: str
    part: int = 0
    num_parts: int = 1


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How one sample is drawn."""

    resolution: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    prediction_type: str


def joined_layers(names: Mapping[str, FileName]) -> dict[str, tuple[str, ...]]:
    """The layers that stand under each name of a LoRA file, in the order of their parts.

    Raises:
        ConfigError: of the layers that a file joins under one name, some are missing.
    """
    layers: dict[str, dict[int, str]] = {}
    for layer, entry in names.items():
        layers.setdefault(entry.name, {})[entry.part] = layer
    lacking = {entry.name: entry.num_parts for entry in names.values() if len(layers[entry.name]) < entry.num_parts}
    if lacking:
        raise ConfigError(*(_incomplete(name, list(layers[name].values()), wanted) for name, wanted in lacking.items()))
    return {name: tuple(parts[part] for part in sorted(parts)) for name, parts in layers.items()}


def _incomplete(name: str, layers: Sequence[str], wanted: int) -> Problem:
    what = f"{len(layers)} of the {wanted} layers that LoRA files join as `{name}` would get an adapter"
    return Problem(what, "adapter.targets", fix=f"name the others too: those beside {', '.join(layers)}")


class Family(Protocol):
    """One family of bases; an object of it belongs to one base.

    Conditioning is a named set of tensors. Those of the prompt come from `encode_prompt`, those of the view from
    `view_conditioning`; `predict` and `draw_latents` find them by their names.
    """

    name: ClassVar[str]
    """In the config (`model.family`)."""
    pipelines: ClassVar[tuple[str, ...]]
    """Classes of pipelines (`_class_name` in model_index.json) whose folders are of this family."""
    models: ClassVar[tuple[str, ...]]
    """Components with weights."""
    others: ClassVar[tuple[str, ...]]
    """Components without."""
    denoiser: ClassVar[str]
    """The component whose layers get adapters: the first part of their names in logs, checkpoints and files."""
    prompt_components: ClassVar[tuple[str, ...]]
    """Components whose content decides a prompt's embedding."""
    prediction_types: ClassVar[tuple[str, ...]]
    """Of `epsilon`, `v_prediction` and `flow`, those that it can be trained on."""
    target_presets: ClassVar[Mapping[str, tuple[str, ...]]]
    """Patterns of layer names by the preset's name (`adapter.targets`)."""
    base: BaseFolder

    def __init__(self, base: BaseFolder) -> None: ...

    def problems(self) -> list[Problem]:
        """What is wrong with this base beyond files that are missing or damaged."""

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, along each side."""

    @property
    def kohya_version(self) -> str:
        """`ss_base_model_version` of a LoRA for this base."""

    @property
    def architecture(self) -> str:
        """`modelspec.architecture` of a LoRA for this base."""

    def kohya_names(self, layers: Iterable[str]) -> dict[str, FileName]:
        """Names in kohya's layout of layers such as `unet.down_blocks.0...`."""

    @property
    def max_tokens(self) -> int:
        """Tokens that the text encoder reads of a prompt, its two ends among them."""

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt with its two ends, before any cut."""

    def readable(self, prompt: str) -> str:
        """The beginning of a prompt that the text encoder reads."""

    def view_conditioning(self, view: View) -> dict[str, tuple[float, ...]]:
        """What the denoiser is told of a view, by name; nothing in most families."""

    def entry_bytes(self, resolution: int) -> tuple[int, int]:
        """About what one image's latents and one prompt's embeddings take in the cache; 0 where it is not known."""
        return 0, 0

    def kept_activations(self, layers: Mapping[str, AdaptedLayer], shape: ForwardShape) -> Kept | None:
        """What a forward with adapters on these layers of the denoiser keeps; None where nobody counted it."""
        return None

    def load_text_encoders(self, device: torch.device) -> Any:
        """All that `encode_prompt` needs, frozen, in fp32."""

    def encode_prompt(self, encoders: Any, prompt: str) -> dict[str, torch.Tensor]:
        """What the denoiser is told of a prompt, by name, without a batch axis."""

    def load_vae(self, device: torch.device) -> Any: ...

    def encode_images(self, vae: Any, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [B, C, h, w] of the latents that the denoiser works on, of pixels in -1..1."""

    def decode(self, vae: Any, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W], about -1..1, of such latents."""

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> Any: ...

    def predict(
        self, denoiser: Any, noisy_BChw: torch.Tensor, times_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The denoiser's output [B, C, h, w]; `times_B` are the model's own (`NoisedLatents.model_times_B`)."""

    def draw_latents(
        self, denoiser: Any, vae: Any, prompts: tuple[Conditioning, Conditioning], settings: SampleSettings
    ) -> torch.Tensor:
        """Latents [1, C, h, w] of one image by the stock pipeline, with a prompt and a negative prompt."""

    def load_pipeline(self) -> Any:
        """The stock pipeline of the whole base, on the CPU in fp32, which LoRA files can be loaded into.

        Raises:
            ModelError: there is none.
        """
