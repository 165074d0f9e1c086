"""Every optimizer, one row each: the union of the config, the known names, the plan's notes and docs follow from it.

Never imports torch: a row names its builder as a text, which `lora_trainer.training.optimizers` calls. Outside
optimizers join by the entry point group `lora_trainer.optimizers` (docs/extending.md).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, SerializeAsAny, Tag, WrapValidator

from lora_trainer.errors import Problem
from lora_trainer.schedules.registry import LRSchedulerOptions
from lora_trainer.schedules.schedule import Duration, Horizon, to_steps
from lora_trainer.strict_model import NotBool, NotNegative, Positive, Ratio, StrictModel, matching

ENTRY_POINTS = "lora_trainer.optimizers"
LearningRate = Annotated[float, Field(gt=0, lt=1), NotBool]
Beta = Annotated[float, Field(ge=0, lt=1), NotBool]


class GroupConfig(StrictModel):
    """Some of the adapter's weights with a learning rate, or a whole schedule, of their own."""

    name: Annotated[str, matching(r"[A-Za-z][A-Za-z0-9_-]*", "a letter, then letters, digits, `_` and `-`")]
    """Stands in the log as `lr/<name>`; all other weights are the group of the denoiser, `unet` with SD."""
    match: Annotated[tuple[str, ...], Field(min_length=1)]
    """Patterns for the end of a layer's or weight's name: `attn2.to_k`, `up_blocks.*.to_v`, `lora_B.weight`."""
    lr: LearningRate | None = None
    """Base learning rate; default that of the optimizer."""
    lr_scheduler: LRSchedulerOptions | None = None
    """Schedule; default that of the run."""


class OptimizerOptions(StrictModel):
    """What every optimizer has."""

    moments: ClassVar[int] = 2
    """Numbers of fp32 that it keeps for each weight; two where nobody counted."""
    type: str
    lr: LearningRate = 1e-4
    """Base learning rate; the schedule multiplies it."""
    weight_decay: NotNegative = 0.0
    """Decay of the adapter's weights."""
    groups: tuple[GroupConfig, ...] = ()
    """Weights with other learning rates; the first group that matches a weight has it."""

    def arguments(self, horizon: Horizon) -> dict[str, Any]:
        """What the builder takes beside the groups of parameters: the options by their own names."""
        return self.model_dump(exclude={"type", "groups"})

    def state_values(self, shape: Sequence[int]) -> float:
        """Numbers of fp32 that it keeps for a tensor of this shape."""
        return self.moments * math.prod(shape)


class AdamOptions(OptimizerOptions):
    """What Adam and its kin have."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running mean and of the running square of the gradient."""
    eps: Positive = 1e-8
    """Added to the denominator."""


class AdamW(AdamOptions):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    type: Literal["adamw"] = "adamw"
    weight_decay: NotNegative = 0.01
    """Decoupled decay, multiplied by the learning rate of each update."""


class Adam(AdamOptions):
    """Adam (Kingma and Ba 2015); its weight decay is an L2 term in the gradient."""

    type: Literal["adam"] = "adam"


class SGD(OptimizerOptions):
    """Stochastic gradient descent. Its learning rates are far above Adam's, so there is no default."""

    type: Literal["sgd"] = "sgd"
    lr: LearningRate
    """Base learning rate; required, as no value serves in general."""
    momentum: Ratio = 0.9
    """Share of the last step that is kept."""
    nesterov: bool = False
    """Look ahead along the momentum; needs momentum > 0."""

    def state_values(self, shape: Sequence[int]) -> float:
        return math.prod(shape) * (self.momentum > 0)


class RMSprop(OptimizerOptions):
    """Gradient divided by a running root mean square (Tieleman and Hinton 2012)."""

    type: Literal["rmsprop"] = "rmsprop"
    alpha: Beta = 0.99
    """Decay of the running square of the gradient."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    momentum: Ratio = 0.0
    """Share of the last step that is kept."""

    def state_values(self, shape: Sequence[int]) -> float:
        return math.prod(shape) * (1 + (self.momentum > 0))


class AdaGrad(OptimizerOptions):
    """Gradient divided by the root of the sum of its squares (Duchi et al. 2011)."""

    moments: ClassVar[int] = 1
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

    def arguments(self, horizon: Horizon) -> dict[str, Any]:
        return super().arguments(horizon) | {"relative_step": False, "warmup_init": False}

    def state_values(self, shape: Sequence[int]) -> float:
        """Of a matrix, and of each of a stack, a row and a column."""
        *stack, rows, columns = shape if len(shape) > 1 else (1, *shape)
        second = math.prod(stack) * (rows + columns) if len(shape) > 1 else math.prod(shape)
        return second + math.prod(shape) * (self.beta1 is not None)


class Lion(OptimizerOptions):
    """Sign of the momentum (Chen et al. 2023). Takes a third to a tenth of AdamW's LR and more decay."""

    moments: ClassVar[int] = 1
    type: Literal["lion"] = "lion"
    lr: LearningRate = 2e-5
    """Base learning rate: a third to a tenth of AdamW's."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decay of the update and of the momentum."""
    weight_decay: NotNegative = 0.1
    """Decoupled decay: three to ten times AdamW's."""


class AdamW8bit(AdamOptions):
    """AdamW with 8-bit moments (Dettmers et al. 2022). Tensors under 4096 values stay in 32 bits: most small LoRAs."""

    type: Literal["adamw_8bit"] = "adamw_8bit"
    weight_decay: NotNegative = 0.01
    """Decoupled decay, multiplied by the learning rate of each update."""

    def state_values(self, shape: Sequence[int]) -> float:
        """A byte each for two moments, and a scale per 256 of them."""
        number = math.prod(shape)
        return 2 * number if number < 4096 else 2 * (number / 4 + number / 256)


class Prodigy(OptimizerOptions):
    """AdamW that estimates its own step size d (Mishchenko and Defazio 2023); the LR is a factor on d."""

    moments: ClassVar[int] = 4  # two, where it began, and a sum for its estimate
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

    def arguments(self, horizon: Horizon) -> dict[str, Any]:
        return super().arguments(horizon) | {"warmup_steps": to_steps(self.warmup_steps, horizon)}


@dataclass(frozen=True, slots=True)
class OptimizerRow:
    """One optimizer: the class of its options, what builds it, and what is known of it without building it."""

    options: type[OptimizerOptions]
    build: str
    """`package.module:function`, called with the groups of parameters and the options' `arguments` by keyword."""
    usual_lr: tuple[float, float]
    """Base learning rates for a LoRA outside of which the plan has a note (docs/learning_rates.md)."""
    decoupled_decay: bool = False
    """Whether an update shrinks each weight by LR x weight decay, whatever its gradient."""
    element_wise: bool = False
    """Whether a weight's update depends on its own gradients alone, so that weights may lie in one flat buffer."""
    extra: str | None = None
    """The extra of lora_trainer that installs the builder's package, where one does."""

    @property
    def name(self) -> str:
        """Its name in the config (`optimizer.type`)."""
        return self.options.model_fields["type"].default


ROWS = (
    OptimizerRow(AdamW, "torch.optim:AdamW", (1e-5, 1e-2), decoupled_decay=True, element_wise=True),
    OptimizerRow(Adam, "torch.optim:Adam", (1e-5, 1e-2), element_wise=True),
    OptimizerRow(SGD, "torch.optim:SGD", (1e-3, 1.0), element_wise=True),
    OptimizerRow(RMSprop, "torch.optim:RMSprop", (1e-5, 1e-2), element_wise=True),
    OptimizerRow(AdaGrad, "torch.optim:Adagrad", (1e-4, 1e-1), element_wise=True),
    OptimizerRow(Adafactor, "transformers.optimization:Adafactor", (1e-5, 1e-2)),
    OptimizerRow(Lion, "lion_pytorch:Lion", (1e-6, 1e-3), decoupled_decay=True, element_wise=True, extra="optimizers"),
    OptimizerRow(AdamW8bit, "bitsandbytes.optim:AdamW8bit", (1e-5, 1e-2), decoupled_decay=True, extra="8bit"),
    OptimizerRow(Prodigy, "prodigyopt:Prodigy", (0.5, 2.0), extra="optimizers"),
    OptimizerRow(
        ScheduleFreeAdamW,
        "schedulefree:AdamWScheduleFree",
        (1e-5, 2.5e-2),
        decoupled_decay=True,
        element_wise=True,
        extra="optimizers",
    ),
)
OPTIMIZERS: Mapping[str, OptimizerRow] = {row.name: row for row in ROWS}


def outside_names() -> list[str]:
    """Optimizers that installed packages offer."""
    return sorted({entry.name for entry in entry_points(group=ENTRY_POINTS)} - set(OPTIMIZERS))


def optimizer_row(name: str) -> OptimizerRow:
    """The row of an optimizer of ours or of an installed package.

    Raises:
        ValueError: there is none of this name, or its package does not give one.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            row = entry.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the optimizer `{name}` cannot be imported: {error}") from error
        if not isinstance(row, OptimizerRow) or row.name != name:
            raise ValueError(f"`{entry.value}` is no OptimizerRow whose options have the type `{name}`")
        return row
    raise ValueError(f"`{name}` is no optimizer")


def cannot_build(row: OptimizerRow, why: str) -> Problem:
    """That the package of an optimizer is missing or broken."""
    what = f"optimizer.type: {row.name} needs `{row.build}`, which cannot be imported"
    package = f"install or mend the package `{row.build.partition(':')[0].partition('.')[0]}`"
    return Problem(what, why=why, fix=f"pip install 'lora_trainer[{row.extra}]'" if row.extra else package)


def _tag(value: Any) -> str | None:
    """The member of the union: a name of ours, `:outside` for an installed one, else what is written."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind is None:
        return None
    return ":outside" if str(kind) not in OPTIMIZERS and str(kind) in outside_names() else str(kind)


def _by_its_row(value: Any, _: Any) -> OptimizerOptions:
    """The options of an outside optimizer, checked by their own class."""
    return value if isinstance(value, OptimizerOptions) else optimizer_row(value["type"]).options.model_validate(value)


if TYPE_CHECKING:
    AnyOptimizerOptions = OptimizerOptions
else:
    _ours = [Annotated[row.options, Tag(row.name)] for row in ROWS]
    _outside = Annotated[SerializeAsAny[OptimizerOptions], WrapValidator(_by_its_row), Tag(":outside")]
    AnyOptimizerOptions = Annotated[reduce(operator.or_, [*_ours, _outside]), Discriminator(_tag)]
