"""The adapters of all trials on one frozen denoiser, injected by peft: one named adapter per trial."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_trainer.config.schema import LoraConfig
from lora_trainer.diffusion import random_streams
from lora_trainer.models.adapters.packed import PackedForward

Tensors = dict[str, torch.Tensor]
_SAVED_ENDINGS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude_vector": ".lora_magnitude_vector"}


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter to inject: its options and the exact names of its layers."""

    config: LoraConfig
    targets: tuple[str, ...]


class AdapterBank:
    """Named adapters on one denoiser; which of them act is switched by `active`."""

    def __init__(self, denoiser: nn.Module, component: str, names: Sequence[str]) -> None:
        self.denoiser, self.component = denoiser, component
        self.names = tuple(names)
        self._layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
        self._active: str = names[-1]
        self._packed: dict[tuple[str, ...], PackedForward] = {}

    @classmethod
    def attach(
        cls, denoiser: nn.Module, component: str, adapters: Mapping[str, AdapterSpec], *, seed: int
    ) -> AdapterBank:
        """Inject the adapters, in fp32, with initial weights that are equal where their shapes are.

        Args:
            component: the denoiser's name in its base, which all names of parameters begin with.
            seed: A is drawn per (seed, layer) from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), peft's distribution; B is zero.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            for name, spec in adapters.items():
                inject_adapter_in_model(peft_config(spec.config, spec.targets), denoiser, adapter_name=name)
        bank = cls(denoiser, component, list(adapters))
        for name in adapters:
            for parameter in bank.parameters(name).values():
                parameter.data = parameter.data.float()  # peft follows the base's dtype; updates need fp32
                parameter.requires_grad_(True)
            bank._initialise(name, seed)
        bank._switch(bank.names[0])
        return bank

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of one adapter by `<component>.<layer>.lora_A.weight`, as diffusers saves them."""
        marks = {f".lora_{kind}.{name}.weight": ending for kind, ending in _SAVED_ENDINGS.items()}
        return {
            f"{self.component}.{key.removesuffix(mark)}{ending}": parameter
            for key, parameter in self.denoiser.named_parameters()
            for mark, ending in marks.items()
            if key.endswith(mark)
        }

    def state(self, name: str) -> Tensors:
        """The weights of one adapter, detached, by the names of `parameters`."""
        return {key: parameter.detach() for key, parameter in self.parameters(name).items()}

    @contextmanager
    def active(self, names: Sequence[str]) -> Iterator[None]:
        """Let exactly these adapters act inside the block: one by peft's own forward, several packed.

        Packed, the batch holds one copy of the images per adapter, in the order of the names ([P*B, ...]).
        """
        if len(names) == 1:
            before = self._active
            self._switch(names[0])
            try:
                yield
            finally:
                self._switch(before)
            return
        members = tuple(names)
        if members not in self._packed:
            self._packed[members] = PackedForward(self._layers, members)
        with self._packed[members].acting():
            yield

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
        own = {key: tensor.clone() for key, tensor in self.state(name).items()}
        self.load(name, state)
        try:
            yield
        finally:
            self.load(name, own)

    @torch.no_grad()
    def load(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Copy weights as given by `state` into an adapter, in place."""
        for key, tensor in self.state(name).items():
            tensor.copy_(state[key])

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

    @torch.no_grad()
    def _initialise(self, name: str, seed: int) -> None:
        initial = self.initial(name, seed)
        for key, parameter in self.parameters(name).items():
            if ".lora_A" in key or ".lora_B" in key:
                parameter.copy_(initial(key))


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
