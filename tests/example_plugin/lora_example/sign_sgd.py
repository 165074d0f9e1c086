"""An optimizer, as torch has them: its state lies in `state` and `param_groups` alone."""

from typing import Any

import torch


class SignSGD(torch.optim.Optimizer):
    """Sign of the momentum times the learning rate, and decoupled decay."""

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter not in self.state:
                    self.state[parameter]["mean"] = torch.zeros_like(parameter)
                mean = self.state[parameter]["mean"].lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(mean.sign(), alpha=-group["lr"])
