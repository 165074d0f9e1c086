"""Which layers get an adapter, at the true SD 1.5 shape."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from lora_trainer.config.schema import LoraConfig
from lora_trainer.errors import ConfigError
from lora_trainer.models.adapters.targets import kohya_notes, select_targets
from lora_trainer.models.stable_diffusion import StableDiffusion

PRESETS = StableDiffusion.target_presets


@pytest.fixture(scope="module")
def sd15() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: tuple(m.weight.shape) for name, m in unet.named_modules() if isinstance(m, layers)}


@pytest.mark.parametrize(
    ("targets", "count"),
    [("attention", 128), ("attention+feedforward", 160), ("transformer", 192), ("transformer+resnet", 278)],
)
def test_counts_at_sd15_shape(sd15: dict[str, tuple[int, ...]], targets: str, count: int) -> None:
    assert len(select_targets(sd15, targets, PRESETS)) == count


def test_all_linear_takes_every_linear_layer_and_no_other(sd15: dict[str, tuple[int, ...]]) -> None:
    chosen = select_targets(sd15, "all-linear", {})
    assert set(chosen) == {name for name, shape in sd15.items() if len(shape) == 2}


@pytest.mark.parametrize(
    ("targets", "dropped"),
    [
        ("transformer+resnet", 0),
        ("all-linear", 2),
        (["conv_in", "conv_out", "time_embedding.linear_1", "attn2.to_k"], 3),
    ],
)
def test_layers_that_kohyas_network_drops_are_named(
    sd15: dict[str, tuple[int, ...]], targets: str | list[str], dropped: int
) -> None:
    """As many as its network on this UNet gave back: two and three layers, of three keys each."""
    notes = [*kohya_notes(LoraConfig(), select_targets(sd15, targets, PRESETS), PRESETS)]
    assert [f"drops {dropped} layers" in note for note in notes] == [True] * bool(dropped)
    (said,) = kohya_notes(LoraConfig(use_dora=True), ["mid_block.attentions.0.proj_in"], PRESETS)
    assert "LyCORIS" in said


def test_patterns_match_from_a_dot_to_the_end(sd15: dict[str, tuple[int, ...]]) -> None:
    assert len(select_targets(sd15, ["attn2.to_k"], PRESETS)) == 16
    up = select_targets(sd15, ["up_blocks.*.to_v"], PRESETS)
    assert len(up) == 18
    assert all(name.startswith("up_blocks") for name in up)
    assert len(select_targets(sd15, ["to_k", "attn2.to_k"], PRESETS)) == 32
    assert list(select_targets(sd15, ["conv_in"], PRESETS)) == ["conv_in"]


def test_a_pattern_that_matches_nothing_is_refused(sd15: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="`q_proj` matches no layer"):
        select_targets(sd15, ["to_k", "q_proj"], PRESETS)
    with pytest.raises(ConfigError, match="`o_k` matches no layer"):
        select_targets(sd15, ["o_k"], PRESETS)


def test_an_unknown_preset_is_refused_with_those_of_the_family(sd15: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError) as caught:
        select_targets(sd15, "attentoin", PRESETS)
    assert "did you mean attention? known: attention, attention+feedforward, transformer, transformer+resnet" in str(
        caught.value
    )
