"""Contracts for plug-ins, as base classes of tests: subclass one, give a name and options, and run pytest.

Public, and imported by nothing in the package. Our own rows pass the same contracts (docs/extending.md).
"""

from lora_trainer.testing.optimizer_contract import OptimizerContract
from lora_trainer.testing.schedule_contract import ScheduleContract

__all__ = ["OptimizerContract", "ScheduleContract"]
