"""The adapters of all trials on one frozen denoiser, injected by peft: one named adapter per trial."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_trainer.config.schema import LoraConfig
from lora_trainer.diffusion import random_streams
from lora_trainer.models.adapters.packed import Forward, acting, packed_forward

_SAVED_ENDINGS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude_vector": ".lora_magnitude_vector"}


class AdapterBank:
    """Named adapters on one denoiser; which of them act is switched by `active`."""

    def __init__(
        self, denoiser: nn.Module, component: str, adapters: Mapping[str, PeftLoraConfig], *, seed: int
    ) -> None:
        """Inject the adapters, in fp32, with initial weights that are equal where their shapes are.

        Args:
            component: the denoiser's name in its base, which all names of parameters begin with.
            adapters: by name, from `peft_config`.
            seed: A is drawn per (seed, layer) from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), peft's distribution; B is zero.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            for name, config in adapters.items():
                inject_adapter_in_model(config, denoiser, adapter_name=name)
        self.denoiser, self.component, self.names = denoiser, component, tuple(adapters)
        self._layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
        self._active: str = self.names[-1]
        self._packed: dict[tuple[str, ...], dict[LoraLayer, Forward]] = {}
        for name in adapters:
            initial = self.initial(name, seed)
            for key, parameter in self.parameters(name).items():
                parameter.data = parameter.data.float()  # peft follows the base's dtype; updates need fp32
                parameter.requires_grad_(True)
                if key.endswith((".lora_A.weight", ".lora_B.weight")):
                    parameter.data.copy_(initial(key))
        self._switch(self.names[0])

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of one adapter by `<component>.<layer>.lora_A.weight`, as diffusers saves them."""
        marks = {f".lora_{kind}.{name}.weight": ending for kind, ending in _SAVED_ENDINGS.items()}
        return {
            f"{self.component}.{key.removesuffix(mark)}{ending}": parameter
            for key, parameter in self.denoiser.named_parameters()
            for mark, ending in marks.items()
            if key.endswith(mark)
        }

    @contextmanager
    def active(self, names: Sequence[str]) -> Iterator[None]:
        """Let exactly these adapters act inside the block: one by peft's own forward, several packed.

        Packed, the batch holds one copy of the images per adapter, in the order of the names ([P*B, ...]).
        """
        members = tuple(names)
        if len(members) > 1:
            if members not in self._packed:
                self._packed[members] = {layer: packed_forward(layer, members) for layer in self._layers}
            with acting(self._packed[members]):
                yield
            return
        before = self._active
        self._switch(members[0])
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let no adapter act inside the block: the frozen base alone."""
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False

    @contextmanager
    def swapped(self, name: str, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let an adapter carry other weights (an average, say) inside the block."""
        before = {key: parameter.detach().clone() for key, parameter in self.parameters(name).items()}
        try:
            self.load(name, state)
            yield
        finally:
            self.load(name, before)

    @torch.no_grad()
    def load(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Copy weights, by the names of `parameters`, into an adapter, in place."""
        for key, parameter in self.parameters(name).items():
            parameter.copy_(state[key])

    def _switch(self, name: str) -> None:
        """Set the name on each layer directly: peft's `set_adapter` walks all parameters and freezes the others."""
        if name != self._active:
            for layer in self._layers:
                layer._active_adapter = [name]
            self._active = name

    def initial(self, name: str, seed: int) -> Callable[[str], torch.Tensor]:
        """What an A or B of this adapter was before training, drawn again by its key, on the CPU."""
        shapes = {key: parameter.shape for key, parameter in self.parameters(name).items()}

        def draw(key: str) -> torch.Tensor:
            layer, _, kind = key.removeprefix(f"{self.component}.").rpartition(".lora_")
            if kind.startswith("B"):
                return torch.zeros(shapes[key])
            bound = 1 / math.sqrt(math.prod(shapes[key][1:]))
            return random_streams.uniform(-bound, bound, shapes[key], seed, "adapter init", layer)

        return draw


def plain_number(number: float) -> int | float:
    """An integer where it is whole, as other trainers write alpha."""
    return int(number) if float(number).is_integer() else number


def peft_config(config: LoraConfig, targets: Sequence[str]) -> PeftLoraConfig:
    """Our options in peft's words."""
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=plain_number(config.alpha),
        lora_dropout=config.dropout,
        target_modules=list(targets),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
    )
