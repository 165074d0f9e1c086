"""The adapters of all trials on one frozen denoiser, injected by peft: one named adapter per trial."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_trainer import streams
from lora_trainer.config.schema import LoraConfig

Tensors = dict[str, torch.Tensor]
_SAVED_ENDINGS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude_vector": ".lora_magnitude_vector"}


class AdapterBank:
    """Named adapters on one denoiser; which of them act is switched by `active`."""

    def __init__(self, denoiser: nn.Module, names: Sequence[str], config: LoraConfig) -> None:
        self.denoiser = denoiser
        self.names = tuple(names)
        self.config = config
        self._layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
        self._active: tuple[str, ...] = (names[-1],)

    @classmethod
    def attach(
        cls, denoiser: nn.Module, config: LoraConfig, targets: Sequence[str], names: Sequence[str], *, seed: int
    ) -> AdapterBank:
        """Inject an adapter per name into the target layers, in fp32, with equal initial weights.

        Args:
            targets: exact layer names.
            seed: A is drawn per (seed, layer) from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), peft's distribution; B is zero.
        """
        for name in names:
            inject_adapter_in_model(peft_config(config, targets), denoiser, adapter_name=name)
        bank = cls(denoiser, names, config)
        for name in names:
            for parameter in bank.parameters(name).values():
                parameter.data = parameter.data.float()  # peft follows the base's dtype; updates need fp32
                parameter.requires_grad_(True)
            bank._initialise(name, seed)
        bank._switch((names[0],))
        return bank

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of one adapter by peft's names in a saved file (`<layer>.lora_A.weight`)."""
        marks = {f".lora_{kind}.{name}.weight": ending for kind, ending in _SAVED_ENDINGS.items()}
        return {
            key.removesuffix(mark) + ending: parameter
            for key, parameter in self.denoiser.named_parameters()
            for mark, ending in marks.items()
            if key.endswith(mark)
        }

    def state(self, name: str) -> Tensors:
        """The weights of one adapter, detached, by the names of `parameters`."""
        return {key: parameter.detach() for key, parameter in self.parameters(name).items()}

    @contextmanager
    def active(self, names: Sequence[str]) -> Iterator[None]:
        """Let exactly these adapters act inside the block."""
        before = self._active
        self._switch(tuple(names))
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

    def _switch(self, names: tuple[str, ...]) -> None:
        """Set the names on each layer directly: peft's `set_adapter` walks all parameters and freezes the others."""
        if names != self._active:
            for layer in self._layers:
                layer._active_adapter = list(names)
            self._active = names

    @torch.no_grad()
    def _initialise(self, name: str, seed: int) -> None:
        for key, parameter in self.parameters(name).items():
            layer, _, kind = key.rpartition(".lora_")
            if kind.startswith("A"):
                bound = 1 / math.sqrt(parameter[0].numel())
                parameter.copy_(streams.uniform(-bound, bound, parameter.shape, seed, "adapter init", layer))
            elif kind.startswith("B"):
                parameter.zero_()


def peft_config(config: LoraConfig, targets: Sequence[str]) -> PeftLoraConfig:
    """Our options in peft's words."""
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=list(targets),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
    )


def scale(config: LoraConfig) -> float:
    """The factor on B A: alpha / rank, or alpha / sqrt(rank) with rank stabilisation."""
    return config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)
