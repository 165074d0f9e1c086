"""What the forward of a UNet with adapters keeps for its backward, counted from its configuration. Never imports torch.

The walk goes through the layers as diffusers and peft run them, on tensors that are only sizes. Autograd keeps what a
backward reads: of a frozen linear layer its weight alone; of an adapted one and of any convolution the input too, and
of an adapter its product with A; of norms, activations and attention what goes in. Before the first adapted layer
nothing has a gradient, so nothing is kept. A tensor that several read is kept once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

KNOWN_BLOCKS = {f"{cross}{way}Block2D" for cross in ("", "CrossAttn") for way in ("Down", "Up")}
MIDDLE_BLOCK = "UNetMidBlock2DCrossAttn"


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """What is counted of a layer that gets an adapter."""

    rank: int
    num_weights: int
    """In A and B."""


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """How a forward is run."""

    batch_size: int
    """Images of one trial."""
    latent_side: int
    num_tokens: int
    element_bytes: int
    """Of the base and of what goes through it."""
    on_gpu: bool
    """Whether autocast runs norms in fp32, and the mask of a dropout takes a byte."""
    num_trials: int = 1
    checkpointing: bool = False
    use_dora: bool = False
    dropout: bool = False


@dataclass(eq=False, slots=True)
class _Tensor:
    numbers: int
    element_bytes: int
    has_grad: bool = False

    @property
    def num_bytes(self) -> int:
        return self.numbers * self.element_bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes."""

    by_forward: int
    recomputed: int
    """By the largest checkpointed part, when the backward runs it again."""
    largest: int
    """Of one tensor."""


def kept_activations(config: Mapping[str, Any], layers: Mapping[str, AdaptedLayer], shape: ForwardShape) -> Kept | None:
    """What one pass keeps; None for a UNet with other blocks than Stable Diffusion's.

    Args:
        config: of the UNet, as in its config.json.
        layers: by name, those with an adapter.
    """
    blocks = {*config["down_block_types"], *config["up_block_types"]}
    middle = config.get("mid_block_type", MIDDLE_BLOCK)
    if not blocks <= KNOWN_BLOCKS or middle not in (None, MIDDLE_BLOCK) or config.get("dual_cross_attention"):
        return None
    walk = _Walk(config, layers, shape)
    walk.unet()
    return Kept(walk.num_kept, walk.recomputed, max((t.num_bytes for t in walk.kept), default=0))


def _at(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, Sequence) else value


@dataclass
class _Walk:
    config: Mapping[str, Any]
    layers: Mapping[str, AdaptedLayer]
    shape: ForwardShape
    kept: dict[_Tensor, None] = field(default_factory=dict)
    recomputed: int = 0

    def __post_init__(self) -> None:
        self.batch = self.shape.batch_size * self.shape.num_trials
        self.side, self.sides = self.shape.latent_side, list[int]()
        self.channels: Sequence[int] = self.config["block_out_channels"]
        self.prompt = self.tensor(self.batch * self.shape.num_tokens * _at(self.config["cross_attention_dim"], 0))

    @property
    def num_kept(self) -> int:
        return sum(tensor.num_bytes for tensor in self.kept)

    def tensor(self, numbers: int, *inputs: _Tensor, element_bytes: int | None = None) -> _Tensor:
        has_grad = any(tensor.has_grad for tensor in inputs)
        return _Tensor(numbers, element_bytes or self.shape.element_bytes, has_grad)

    def keep(self, *tensors: _Tensor) -> None:
        self.kept |= dict.fromkeys(tensors)

    @contextmanager
    def checkpointed(self, *inputs: _Tensor) -> Iterator[None]:
        """Of what is kept inside the block only the inputs stay; the backward makes the rest again."""
        outside, self.kept = self.kept, {}
        yield
        inside = self.num_kept
        if self.shape.checkpointing:
            self.recomputed = max(self.recomputed, inside)
            self.kept = dict.fromkeys(inputs) if inside else {}
        self.kept = outside | self.kept

    def norm(self, x: _Tensor, num_groups: int) -> _Tensor:
        """`num_groups` means and deviations."""
        size = 4 if self.shape.on_gpu else x.element_bytes
        if x.has_grad:
            cast = x if size == x.element_bytes else self.tensor(x.numbers, element_bytes=size)
            self.keep(cast, self.tensor(2 * num_groups, element_bytes=size))
        return self.tensor(x.numbers, x, element_bytes=size)

    def activation(self, x: _Tensor) -> _Tensor:
        if x.has_grad:
            self.keep(x)
        return self.tensor(x.numbers, x, element_bytes=x.element_bytes)

    def linear(self, name: str, x: _Tensor, numbers: int, out_channels: int) -> _Tensor:
        """A layer whose output has so many numbers, with its adapter where it has one."""
        out, adapted, shape = self.tensor(numbers, x), self.layers.get(name), self.shape
        if adapted is None:
            return out
        out.has_grad = True
        is_cast, is_packed = shape.element_bytes < 4, shape.num_trials > 1
        # peft casts to fp32 and autocast back: a copy in each layer. The packed products take what is cast as it is
        copies = shape.dropout or (is_cast and not is_packed) or x.element_bytes > shape.element_bytes
        read = self.tensor(x.numbers) if copies else x
        self.keep(read, self.tensor(numbers // out_channels * adapted.rank))
        if is_cast or is_packed:
            self.keep(self.tensor(adapted.num_weights * shape.num_trials))
        if shape.dropout and x.has_grad:
            self.keep(self.tensor(x.numbers, element_bytes=1 if shape.on_gpu else 4))
        if shape.use_dora:
            self.keep(self.tensor(numbers), self.tensor(numbers))
        return out

    def convolution(self, name: str, x: _Tensor, numbers: int, out_channels: int) -> _Tensor:
        """One more than a linear layer: autograd keeps its input even where its weight is frozen."""
        shape, adapted = self.shape, self.layers.get(name)
        if x.has_grad:
            self.keep(x if x.element_bytes == shape.element_bytes else self.tensor(x.numbers))
        if adapted is not None and shape.num_trials > 1 and shape.batch_size > 1:  # the packed one's copies, by image
            self.keep(self.tensor(x.numbers), self.tensor(self.batch * out_channels * adapted.rank))
        return self.linear(name, x, numbers, out_channels)

    def resnet(self, name: str, x: _Tensor, out_channels: int) -> _Tensor:
        num_groups, numbers = self.batch * self.config["norm_num_groups"], self.batch * self.side**2 * out_channels
        hidden = self.activation(self.norm(x, num_groups))
        hidden = self.convolution(f"{name}.conv1", hidden, numbers, out_channels)
        time = self.linear(f"{name}.time_emb_proj", self.activation(self.time), self.batch * out_channels, out_channels)
        hidden = self.activation(self.norm(self.tensor(numbers, hidden, time), num_groups))
        hidden = self.convolution(f"{name}.conv2", hidden, numbers, out_channels)
        if x.numbers != numbers:
            x = self.convolution(f"{name}.conv_shortcut", x, numbers, out_channels)
        return self.tensor(numbers, hidden, x)

    def transformer(self, name: str, x: _Tensor, block: int) -> _Tensor:
        """A transformer over the pixels of one level of the UNet."""
        channels, config = self.channels[block], self.config
        num_heads = _at(config.get("num_attention_heads") or config["attention_head_dim"], block)
        hidden = self.norm(x, self.batch * config["norm_num_groups"])
        project = self.linear if config.get("use_linear_projection") else self.convolution
        hidden = project(f"{name}.proj_in", hidden, x.numbers, channels)
        for index in range(_at(config.get("transformer_layers_per_block", 1), block)):
            part = f"{name}.transformer_blocks.{index}"
            with self.checkpointed(hidden, self.prompt):
                read = self.norm(hidden, self.batch * self.side**2)
                hidden = self.tensor(x.numbers, hidden, self.attention(f"{part}.attn1", read, read, num_heads))
                read = self.norm(hidden, self.batch * self.side**2)
                hidden = self.tensor(x.numbers, hidden, self.attention(f"{part}.attn2", read, self.prompt, num_heads))
                read = self.norm(hidden, self.batch * self.side**2)
                hidden = self.tensor(x.numbers, hidden, self.feedforward(f"{part}.ff", read, channels))
        if not config.get("use_linear_projection"):
            hidden = self.tensor(x.numbers, hidden)  # a convolution reads a copy in the order of images
        return self.tensor(x.numbers, project(f"{name}.proj_out", hidden, x.numbers, channels), x)

    def attention(self, name: str, x: _Tensor, read: _Tensor, num_heads: int) -> _Tensor:
        num_rows = self.batch * self.side**2
        channels = x.numbers // num_rows
        num_read = num_rows if read is x else self.batch * self.shape.num_tokens
        query = self.linear(f"{name}.to_q", x, x.numbers, channels)
        key, value = (self.linear(f"{name}.to_{kind}", read, num_read * channels, channels) for kind in "kv")
        out = self.tensor(x.numbers, query, key, value)
        if out.has_grad:
            self.keep(query, key, value, out, self.tensor(num_rows * num_heads, element_bytes=4))
        return self.linear(f"{name}.to_out.0", out, x.numbers, channels)

    def feedforward(self, name: str, x: _Tensor, channels: int) -> _Tensor:
        """GEGLU: one half times the GELU of the other, both views of one product."""
        wide = self.linear(f"{name}.net.0.proj", x, 8 * x.numbers, 8 * channels)
        gate = self.tensor(4 * x.numbers, self.activation(wide))
        if wide.has_grad:
            self.keep(gate)
        return self.linear(f"{name}.net.2", self.tensor(4 * x.numbers, gate), x.numbers, channels)

    def unet(self) -> None:
        config, width = self.config, self.channels[0]
        time = self.linear(
            "time_embedding.linear_1", self.tensor(self.batch * width), self.batch * 4 * width, 4 * width
        )
        self.time = self.linear("time_embedding.linear_2", self.activation(time), time.numbers, 4 * width)
        num_latents = self.batch * self.side**2
        x = self.convolution("conv_in", self.tensor(num_latents * config["in_channels"]), num_latents * width, width)
        x = self.up(self.middle(self.down(x)))
        x = self.activation(self.norm(x, self.batch * config["norm_num_groups"]))
        self.convolution("conv_out", x, num_latents * config["out_channels"], config["out_channels"])
        self.keep(self.tensor(num_latents * config["out_channels"], element_bytes=4))  # how far it is off

    def down(self, x: _Tensor) -> _Tensor:
        self.skipped = [x]
        for block, kind in enumerate(self.config["down_block_types"]):
            name, channels = f"down_blocks.{block}", self.channels[block]
            for index in range(_at(self.config["layers_per_block"], block)):
                with self.checkpointed(x, self.time):
                    x = self.resnet(f"{name}.resnets.{index}", x, channels)
                if kind.startswith("Cross"):
                    x = self.transformer(f"{name}.attentions.{index}", x, block)
                self.skipped.append(x)
            if block + 1 < len(self.channels):
                self.sides.append(self.side)
                self.side = (self.side + 1) // 2
                numbers = self.batch * self.side**2 * channels
                x = self.convolution(f"{name}.downsamplers.0.conv", x, numbers, channels)
                self.skipped.append(x)
        return x

    def middle(self, x: _Tensor) -> _Tensor:
        if self.config.get("mid_block_type", MIDDLE_BLOCK) is None:
            return x
        last = len(self.channels) - 1
        x = self.resnet("mid_block.resnets.0", x, self.channels[last])
        x = self.transformer("mid_block.attentions.0", x, last)
        with self.checkpointed(x, self.time):
            return self.resnet("mid_block.resnets.1", x, self.channels[last])

    def up(self, x: _Tensor) -> _Tensor:
        last = len(self.channels) - 1
        for index, kind in enumerate(self.config["up_block_types"]):
            name, block = f"up_blocks.{index}", last - index
            for layer in range(_at(self.config["layers_per_block"], block) + 1):
                skipped = self.skipped.pop()
                x = self.tensor(x.numbers + skipped.numbers, x, skipped)
                with self.checkpointed(x, self.time):
                    x = self.resnet(f"{name}.resnets.{layer}", x, self.channels[block])
                if kind.startswith("Cross"):
                    x = self.transformer(f"{name}.attentions.{layer}", x, block)
            if index < last:
                self.side = self.sides.pop()
                numbers = self.batch * self.side**2 * self.channels[block]
                larger = self.tensor(numbers, x)
                x = self.convolution(f"{name}.upsamplers.0.conv", larger, numbers, self.channels[block])
        return x
