"""Options of each optimizer, by `optimizer.type`; `lora_trainer.optimizers` builds them with torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_trainer.section import NotBool, Ratio, Section

LearningRate = Annotated[float, Field(gt=0, lt=1), NotBool]
NotNegative = Annotated[float, Field(ge=0), NotBool]
Positive = Annotated[float, Field(gt=0), NotBool]
Beta = Annotated[float, Field(ge=0, lt=1), NotBool]


class OptimizerOptions(Section):
    """What every optimizer has."""

    type: str
    lr: LearningRate = 1e-4
    """Base learning rate; the schedule multiplies it."""
    weight_decay: NotNegative = 0.0
    """Decay of the adapter's weights."""


class AdamW(OptimizerOptions):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running mean and of the running square of the gradient."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: NotNegative = 0.01
    """Decoupled decay, multiplied by the learning rate of each update."""


class Adam(OptimizerOptions):
    """Adam (Kingma and Ba 2015); its weight decay is an L2 term in the gradient."""

    type: Literal["adam"] = "adam"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running mean and of the running square of the gradient."""
    eps: Positive = 1e-8
    """Added to the denominator."""


class SGD(OptimizerOptions):
    """Stochastic gradient descent. Its learning rates are far above Adam's, so there is no default."""

    type: Literal["sgd"] = "sgd"
    lr: LearningRate
    """Base learning rate; required, as no value serves in general."""
    momentum: Ratio = 0.9
    """Share of the last step that is kept."""
    nesterov: bool = False
    """Look ahead along the momentum; needs momentum > 0."""


class RMSprop(OptimizerOptions):
    """Gradient divided by a running root mean square (Tieleman and Hinton 2012)."""

    type: Literal["rmsprop"] = "rmsprop"
    alpha: Beta = 0.99
    """Decay of the running square of the gradient."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    momentum: Ratio = 0.0
    """Share of the last step that is kept."""


class AdaGrad(OptimizerOptions):
    """Gradient divided by the root of the sum of its squares (Duchi et al. 2011)."""

    type: Literal["adagrad"] = "adagrad"
    lr: LearningRate = 1e-3
    """Base learning rate; the accumulated squares shrink it as training goes on."""
    eps: Positive = 1e-10
    """Added to the denominator."""


AnyOptimizerOptions = Annotated[AdamW | Adam | SGD | RMSprop | AdaGrad, Field(discriminator="type")]
