"""Options of each optimizer, by `optimizer.type`; `lora_trainer.training.optimizers` builds them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_trainer.schedules.durations import Duration
from lora_trainer.schedules.registry import LRSchedulerOptions
from lora_trainer.strict_model import NotBool, Ratio, Section

LearningRate = Annotated[float, Field(gt=0, lt=1), NotBool]
NotNegative = Annotated[float, Field(ge=0), NotBool]
Positive = Annotated[float, Field(gt=0), NotBool]
Beta = Annotated[float, Field(ge=0, lt=1), NotBool]


class GroupConfig(Section):
    """Some of the adapter's weights with a learning rate, or a whole schedule, of their own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    """Stands in the log as `lr/<name>`; all other weights are the group `unet`."""
    match: Annotated[tuple[str, ...], Field(min_length=1)]
    """Patterns for the end of a layer's or weight's name: `attn2.to_k`, `up_blocks.*.to_v`, `lora_B.weight`."""
    lr: LearningRate | None = None
    """Base learning rate; default that of the optimizer."""
    lr_scheduler: LRSchedulerOptions | None = None
    """Schedule; default that of the run."""


class OptimizerOptions(Section):
    """What every optimizer has."""

    type: str
    lr: LearningRate = 1e-4
    """Base learning rate; the schedule multiplies it."""
    weight_decay: NotNegative = 0.0
    """Decay of the adapter's weights."""
    groups: tuple[GroupConfig, ...] = ()
    """Weights with other learning rates; the first group that matches a weight has it."""


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


class Adafactor(OptimizerOptions):
    """Second moments as one row and one column per matrix, so little memory (Shazeer and Stern 2018).

    What transformers calls `relative_step` is written out: lr 1e-2, scale_parameter true, a constant schedule. Its own
    rate is min(1e-2, 1 / sqrt(update)), which is 1e-2 for the first 10,000 updates, and would ignore any schedule.
    """

    type: Literal["adafactor"] = "adafactor"
    eps: tuple[Positive, Positive] = (1e-30, 1e-3)
    """Added to the square of the gradient; smallest size that `scale_parameter` counts a tensor with."""
    clip_threshold: Positive = 1.0
    """Root mean square above which a tensor's update is scaled down."""
    decay_rate: Annotated[float, Field(ge=-1, lt=0), NotBool] = -0.8
    """The second moments of update t decay by 1 - t^decay_rate."""
    beta1: Beta | None = None
    """Decay of a running mean of the update; null keeps none and saves its memory."""
    scale_parameter: bool = False
    """Multiply the learning rate by each tensor's root mean square."""


class Lion(OptimizerOptions):
    """Sign of the momentum (Chen et al. 2023). Takes a third to a tenth of AdamW's LR and more decay."""

    type: Literal["lion"] = "lion"
    lr: LearningRate = 2e-5
    """Base learning rate: a third to a tenth of AdamW's."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decay of the update and of the momentum."""
    weight_decay: NotNegative = 0.1
    """Decoupled decay: three to ten times AdamW's."""


class AdamW8bit(OptimizerOptions):
    """AdamW with 8-bit moments (Dettmers et al. 2022). Tensors under 4096 values stay in 32 bits: most small LoRAs."""

    type: Literal["adamw_8bit"] = "adamw_8bit"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running mean and of the running square of the gradient."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: NotNegative = 0.01
    """Decoupled decay, multiplied by the learning rate of each update."""


class Prodigy(OptimizerOptions):
    """AdamW that estimates its own step size d (Mishchenko and Defazio 2023); the LR is a factor on d."""

    type: Literal["prodigy"] = "prodigy"
    lr: Annotated[float, Field(ge=0.1, le=10), NotBool] = 1.0
    """Factor on the estimate: keep 1. All groups have the same."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running mean and of the running square of the gradient."""
    weight_decay: NotNegative = 0.01
    """Decoupled decay, multiplied by d and the LR of each update."""
    d_coef: Positive = 1.0
    """Factor on the estimate inside the optimizer; 2 or 0.5 where the estimate is plainly off."""
    use_bias_correction: bool = True
    """Adam's bias correction; its author advises it for diffusion."""
    safeguard_warmup: bool = True
    """Keep a warm-up from blocking the estimate."""


class ScheduleFreeAdamW(OptimizerOptions):
    """AdamW that averages its weights instead of following a schedule (Defazio et al. 2024)."""

    type: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    lr: LearningRate = 2.5e-4
    """Base learning rate: one to ten times that of scheduled AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Interpolation towards the average, and decay of the running square of the gradient."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: NotNegative = 0.01
    """Decoupled decay, multiplied by the learning rate."""
    warmup_steps: Duration = 0
    """The optimizer's own warm-up: updates, epochs ("2ep") or a share of the run ("5%")."""


AnyOptimizerOptions = Annotated[
    AdamW | Adam | SGD | RMSprop | AdaGrad | Adafactor | Lion | AdamW8bit | Prodigy | ScheduleFreeAdamW,
    Field(discriminator="type"),
]
