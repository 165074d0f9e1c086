"""An optimizer's row. No torch here: a plan is made without it."""

from typing import Literal

from lora_trainer.config.optimizers import LearningRate, OptimizerOptions, OptimizerRow
from lora_trainer.strict_model import Ratio


class SignSGDOptions(OptimizerOptions):
    """Sign of the momentum times the learning rate (Bernstein et al. 2018)."""

    type: Literal["sign_sgd"] = "sign_sgd"
    lr: LearningRate = 1e-5
    """Base learning rate: every weight moves by it."""
    momentum: Ratio = 0.9
    """Share of the last gradients that is kept."""


SIGN_SGD = OptimizerRow(
    SignSGDOptions,
    build="lora_example.sign_sgd:SignSGD",
    usual_lr=(1e-6, 1e-3),
    decoupled_decay=True,
    element_wise=True,
)
