"""Contracts for plug-ins, as base classes of tests: subclass one, give a name and options, and run pytest.

Public, and imported by nothing in the package. Our own rows pass the same contracts (docs/extending.md).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from ruamel.yaml import YAML
from torch.nn import Parameter
from torch.optim import Optimizer

from lora_trainer.config.learning_rates import unusual_rates
from lora_trainer.config.load import check_source, to_yaml
from lora_trainer.config.optimizers import optimizer_row
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.source import Source
from lora_trainer.schedules.registry import allow_plugins
from lora_trainer.schedules.schedule import Horizon, LRSchedule, ScheduleError
from lora_trainer.training.optimizers import build_optimizer, evaluated_weights

HORIZONS = (Horizon(1, 1), Horizon(2, 1), Horizon(10, 5), Horizon(61, 7), Horizon(500, 50))
USUAL = HORIZONS[-1]
SHAPES = ((4, 6), (8, 4), (4, 3, 3, 3))
"""A and B of a linear layer, A of a convolution; the last is in a group of its own."""


class _Contract:
    """What both contracts need: a run of 500 updates with the plug-in in one section of its configuration."""

    section: ClassVar[str]
    name: ClassVar[str]
    """What the section's `type` says."""
    options: ClassVar[dict[str, Any]] = {}
    """All that it requires; the arguments of a schedule's function stand under `args`."""

    def config(self, **more: Any) -> RunConfig:
        """A checked configuration with the plug-in."""
        sections = {
            "name": "contract",
            "model": {"path": "base"},
            "data": {"dir": "images"},
            "train": {"max_steps": USUAL.num_steps},
            "validation": {"fraction": 0.1},
            self.section: {"type": self.name, **self.options, **more},
        }
        return check_source(Source(sections))

    def saved_and_loaded(self) -> RunConfig:
        return check_source(Source(YAML(typ="safe").load(to_yaml(self.config()))))

    def test_it_survives_the_saved_configuration(self) -> None:
        assert self.saved_and_loaded() == self.config()


class ScheduleContract(_Contract):
    """What every LR schedule keeps: subclass as `class TestSawtooth(ScheduleContract)`."""

    section = "lr_scheduler"
    base_lr: ClassVar[float] = 1e-4

    def schedule(self, horizon: Horizon = USUAL, **more: Any) -> LRSchedule:
        """The schedule over a run."""
        return self.resolved(self.config(**more), horizon)

    def resolved(self, config: RunConfig, horizon: Horizon) -> LRSchedule:
        """The schedule of a configuration; one that is named by its path is the author's own, and may run."""
        allow_plugins(True)
        try:
            return config.lr_scheduler.resolve(horizon)
        finally:
            allow_plugins(False)

    def table(self, schedule: LRSchedule) -> list[float]:
        """Its multipliers, the one at the run's end included."""
        return [schedule.multiplier(k, self.base_lr) for k in range(schedule.horizon.num_steps + 1)]

    def fitting(self) -> list[LRSchedule]:
        """It over runs of several lengths; a length may be refused, but only by a `ScheduleError`."""
        schedules = [self.schedule(USUAL)]
        for horizon in HORIZONS[:-1]:
            try:
                schedules.append(self.schedule(horizon))
            except ScheduleError as error:
                assert str(error), "a refusal says why"
        return schedules

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
            self.table(self.schedule(USUAL))
            assert self.table(self.schedule(schedule.horizon)) == straight, "another start of the run has another curve"
        random.setstate(before)

    def test_beyond_the_end_it_keeps_its_last_value(self) -> None:
        for schedule in self.fitting():
            end = schedule.horizon.num_steps
            beyond = [schedule.multiplier(end + more, self.base_lr) for more in (1, 7, 10 * end)]
            assert beyond == [self.table(schedule)[-1]] * 3

    def test_a_warmup_rises_from_zero_in_its_own_time(self) -> None:
        if "warmup_steps" not in type(self.config().lr_scheduler).model_fields:
            assert self.schedule().warmup.num_steps == 0
            return
        num_steps = USUAL.num_steps // 10
        values = self.table(self.schedule(warmup_steps=num_steps, warmup_shape="linear", warmup_start="zero"))
        assert values[:num_steps] == [k / num_steps for k in range(num_steps)]
        assert values[num_steps] > 0, "nothing is left of the rise"

    def test_a_cooldown_falls_to_zero_on_top_of_the_curve(self) -> None:
        length, end = USUAL.num_steps // 10, USUAL.num_steps
        bare, cooled = self.table(self.schedule(cooldown_steps=0)), self.table(self.schedule(cooldown_steps=length))
        assert cooled[: end - length + 1] == bare[: end - length + 1]
        assert cooled[end] == 0
        assert all(low <= high for low, high in zip(cooled, bare, strict=True))

    def test_it_survives_the_saved_configuration(self) -> None:
        super().test_it_survives_the_saved_configuration()
        again = self.resolved(self.saved_and_loaded(), USUAL)
        assert self.table(again) == self.table(self.schedule())


class OptimizerContract(_Contract):
    """What every optimizer keeps: subclass as `class TestSignSGD(OptimizerContract)`."""

    section = "optimizer"

    def built(self, parameters: Sequence[Parameter], **more: Any) -> Optimizer:
        """The optimizer over all but the last parameter, and the last (if there are several) in another group."""
        groups = [parameters[:-1], parameters[-1:]] if len(parameters) > 1 else [parameters]
        return build_optimizer(self.config(**more).optimizer, groups, USUAL)

    def train(
        self, optimizer: Optimizer, parameters: Sequence[Parameter], updates: Iterable[int], lr: float | None = None
    ) -> None:
        """These updates as the trainer makes them, with gradients that are drawn by update and parameter.

        Args:
            lr: the configured one where it is None.
        """
        for k in updates:
            for parameter, gradient in zip(parameters, _gradients(parameters, k), strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = self.config().optimizer.lr if lr is None else lr
            optimizer.step()

    def test_it_builds_over_groups_of_parameters(self) -> None:
        parameters = _parameters()
        optimizer = self.built(parameters)
        assert isinstance(optimizer, Optimizer)
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in parameters]
        assert {group["lr"] for group in optimizer.param_groups} == {self.config().optimizer.lr}

    def test_a_step_moves_every_parameter(self) -> None:
        parameters, before = _parameters(), _parameters()
        self.train(self.built(parameters), parameters, [0])
        for now, then in zip(parameters, before, strict=True):
            assert bool(now.isfinite().all())
            assert not torch.equal(now, then)

    def test_a_learning_rate_of_zero_moves_nothing(self) -> None:
        parameters = _parameters()
        self.train(self.built(parameters), parameters, [0], lr=0.0)
        assert _equal(parameters, _parameters())

    def test_the_same_gradients_give_the_same_bits(self) -> None:
        runs = [_parameters(), _parameters()]
        for parameters in runs:
            self.train(self.built(parameters), parameters, range(4))
        assert _equal(*runs)

    def test_a_resume_goes_on_bit_by_bit(self) -> None:
        """The state goes through what a checkpoint holds: tensors, and plain values as JSON."""
        straight = _parameters()
        before = self.built(straight)
        self.train(before, straight, range(3))
        resumed = [Parameter(p.detach().clone()) for p in straight]
        after = self.built(resumed)
        after.load_state_dict(_through_a_checkpoint(before, after, set(type(self.config().optimizer).model_fields)))
        self.train(before, straight, range(3, 6))
        self.train(after, resumed, range(3, 6))
        assert _equal(straight, resumed)
        assert _equal(evaluated_weights(before) or [], evaluated_weights(after) or [])

    def test_nothing_is_kept_outside_of_state_and_param_groups(self) -> None:
        parameters = _parameters()
        optimizer = self.built(parameters)

        def attributes() -> dict[str, str]:
            return {name: repr(own) for name, own in vars(optimizer).items() if name not in ("state", "param_groups")}

        before = attributes()
        self.train(optimizer, parameters, range(3))
        assert attributes() == before

    def test_a_decoupled_decay_shrinks_by_lr_x_decay(self) -> None:
        if not optimizer_row(self.name).decoupled_decay:
            return
        parameters, before = _parameters(), _parameters()
        optimizer = self.built(parameters, weight_decay=1.0)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for now, then in zip(parameters, before, strict=True):
            expected = torch.full_like(now, self.config().optimizer.lr)
            torch.testing.assert_close(1 - now / then, expected, rtol=0.02, atol=1e-7)

    def test_element_wise_weights_may_lie_in_one_flat_buffer(self) -> None:
        if not optimizer_row(self.name).element_wise:
            return
        apart, flat = _parameters(), Parameter(torch.cat([p.detach().flatten() for p in _parameters()]))
        ours, theirs = self.built(apart), self.built([flat])
        for k in range(4):
            flat.grad = torch.cat([gradient.flatten() for gradient in _gradients(apart, k)])
            theirs.step()
            self.train(ours, apart, [k])
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in apart]), flat.detach())
        alone = _parameters()[:1]
        self.train(self.built(alone), alone, range(4))
        torch.testing.assert_close(alone[0], apart[0])

    def test_its_default_learning_rate_is_usual(self) -> None:
        low, high = optimizer_row(self.name).usual_lr
        assert 0 < low < high
        assert list(unusual_rates(self.config())) == []


def _drawn(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _gradients(parameters: Sequence[torch.Tensor], k: int) -> list[torch.Tensor]:
    """Those of update k: some step may change them in place, so they are drawn anew each time."""
    return [_drawn(parameter.shape, seed=1000 * (k + 1) + index) for index, parameter in enumerate(parameters)]


def _parameters() -> list[Parameter]:
    """The same ones at every call."""
    return [Parameter(_drawn(shape, seed)) for seed, shape in enumerate(SHAPES)]


def _equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _through_a_checkpoint(saved: Optimizer, fresh: Optimizer, options: set[str]) -> dict[str, Any]:
    """The state to load: as saved, but for what the configuration says."""
    state = saved.state_dict()
    tensors = {
        index: {k: v.clone() if isinstance(v, torch.Tensor) else json.loads(json.dumps(v)) for k, v in entries.items()}
        for index, entries in state["state"].items()
    }
    groups = [
        json.loads(json.dumps(stored)) | {k: v for k, v in configured.items() if k in options | {"params"}}
        for stored, configured in zip(state["param_groups"], fresh.state_dict()["param_groups"], strict=True)
    ]
    return {"state": tensors, "param_groups": groups}
