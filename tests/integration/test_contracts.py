"""Our own schedules and optimizers keep the contracts that plug-ins are held to."""

from __future__ import annotations

import pytest

from lora_trainer.config.optimizers import ROWS as OPTIMIZER_ROWS
from lora_trainer.schedules.registry import ROWS as SCHEDULE_ROWS
from lora_trainer.testing import OptimizerContract, ScheduleContract

pytestmark = pytest.mark.quick


class TestOurSchedules(ScheduleContract):
    @pytest.fixture(autouse=True, params=SCHEDULE_ROWS)
    def _row(self, request: pytest.FixtureRequest) -> None:
        self.name, self.options = request.param, SCHEDULE_ROWS[request.param].example  # type: ignore[misc]


class TestOurOptimizers(OptimizerContract):
    @pytest.fixture(autouse=True, params=OPTIMIZER_ROWS, ids=lambda row: row.name)
    def _row(self, request: pytest.FixtureRequest) -> None:
        row = request.param
        if row.extra == "8bit":
            pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
        required = {"lr": 0.1} if row.options.model_fields["lr"].is_required() else {}
        self.name, self.options = row.name, required  # type: ignore[misc]
