"""What every learning-rate schedule keeps, as tests."""

from __future__ import annotations

import math
import random
from typing import Any, ClassVar

from ruamel.yaml import YAML

from lora_trainer.config.load import check_source, to_yaml
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.source import Source
from lora_trainer.schedules.schedule import Horizon, LRSchedule, ScheduleError

HORIZONS = (Horizon(1, 1), Horizon(2, 1), Horizon(10, 5), Horizon(61, 7), Horizon(500, 50))
USUAL = HORIZONS[-1]


class ScheduleContract:
    """Subclass as `class TestSawtooth(ScheduleContract)`; the options must fit a run of 500 updates."""

    name: ClassVar[str]
    """What `lr_scheduler.type` says."""
    options: ClassVar[dict[str, Any]] = {}
    """All that it requires; the arguments of a plug-in's function stand under `args`."""
    base_lr: ClassVar[float] = 1e-4

    def config(self, **more: Any) -> RunConfig:
        """A checked configuration with this schedule."""
        return check_source(
            Source(
                {
                    "name": "contract",
                    "model": {"path": "base"},
                    "data": {"dir": "images"},
                    "train": {"max_steps": USUAL.num_updates},
                    "validation": {"fraction": 0.1},
                    "lr_scheduler": {"type": self.name, **self.options, **more},
                }
            )
        )

    def laid(self, horizon: Horizon = USUAL, **more: Any) -> LRSchedule:
        """The schedule over a run."""
        return self.config(**more).lr_scheduler.resolve(horizon)

    def table(self, schedule: LRSchedule) -> list[float]:
        """Its multipliers, the one at the run's end included."""
        return [schedule.multiplier(k, self.base_lr) for k in range(schedule.horizon.num_updates + 1)]

    def fitting(self) -> list[LRSchedule]:
        """It over runs of several lengths; a length may be refused, but only by a `ScheduleError`."""
        found = [self.laid(USUAL)]
        for horizon in HORIZONS[:-1]:
            try:
                found.append(self.laid(horizon))
            except ScheduleError as error:
                assert str(error), "a refusal says why"
        return found

    def test_every_value_can_be_a_learning_rate(self) -> None:
        for schedule in self.fitting():
            wrong = {k: m for k, m in enumerate(self.table(schedule)) if not (math.isfinite(m) and m >= 0)}
            assert not wrong, f"not finite, or negative, over {schedule.horizon}: {wrong}"

    def test_an_update_has_one_value_in_whatever_order_it_is_asked_for(self) -> None:
        for schedule in self.fitting():
            straight = self.table(schedule)
            order = list(range(len(straight)))
            random.Random(0).shuffle(order)
            assert [schedule.multiplier(k, self.base_lr) for k in order] == [straight[k] for k in order]

    def test_it_depends_on_the_update_and_the_length_alone(self) -> None:
        before = random.getstate()
        for schedule in self.fitting():
            straight = self.table(schedule)
            random.seed(len(straight))
            self.table(self.laid(USUAL))
            assert self.table(self.laid(schedule.horizon)) == straight, "another start of the run has another curve"
        random.setstate(before)

    def test_beyond_the_end_it_keeps_its_last_value(self) -> None:
        for schedule in self.fitting():
            end = schedule.horizon.num_updates
            beyond = [schedule.multiplier(end + more, self.base_lr) for more in (1, 7, 10 * end)]
            assert beyond == [self.table(schedule)[-1]] * 3

    def test_a_warmup_rises_from_zero_in_its_own_time(self) -> None:
        if "warmup_steps" not in type(self.config().lr_scheduler).model_fields:
            assert self.laid().warmup.num_updates == 0
            return
        num_updates = USUAL.num_updates // 10
        values = self.table(self.laid(warmup_steps=num_updates, warmup_shape="linear", warmup_start="zero"))
        assert values[:num_updates] == [k / num_updates for k in range(num_updates)]
        assert values[num_updates] > 0, "nothing is left of the rise"

    def test_a_cooldown_falls_to_zero_on_top_of_the_curve(self) -> None:
        length, end = USUAL.num_updates // 10, USUAL.num_updates
        bare, cooled = self.table(self.laid(cooldown_steps=0)), self.table(self.laid(cooldown_steps=length))
        assert cooled[: end - length + 1] == bare[: end - length + 1]
        assert cooled[end] == 0
        assert all(low <= high for low, high in zip(cooled, bare, strict=True))

    def test_it_survives_the_saved_configuration(self) -> None:
        config = self.config()
        again = check_source(Source(YAML(typ="safe").load(to_yaml(config))))
        assert again == config
        assert self.table(again.lr_scheduler.resolve(USUAL)) == self.table(self.laid())
