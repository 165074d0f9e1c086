"""The plug-in's tests: pytest collects what the contracts ask for."""

from typing import ClassVar

from lora_trainer.testing import OptimizerContract, ScheduleContract


class TestSawtooth(ScheduleContract):
    name = "sawtooth"
    options: ClassVar = {"args": {"low": 0.2}}


class TestSignSGD(OptimizerContract):
    name = "sign_sgd"
