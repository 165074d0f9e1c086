"""What every optimizer keeps, as tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from ruamel.yaml import YAML

from lora_trainer.config.learning_rates import unusual_rates
from lora_trainer.config.load import check_source, to_yaml
from lora_trainer.config.optimizers import OptimizerRow, optimizer_row
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.source import Source
from lora_trainer.schedules.schedule import Horizon
from lora_trainer.training.optimizers import build_optimizer, evaluated_weights

HORIZON = Horizon(100, 10)
SHAPES = ((4, 6), (8, 4), (4, 3, 3, 3))
"""A and B of a linear layer, A of a convolution; the last is in a group of its own."""


class OptimizerContract:
    """Subclass as `class TestSignSGD(OptimizerContract)`."""

    name: ClassVar[str]
    """What `optimizer.type` says."""
    options: ClassVar[dict[str, Any]] = {}
    """All that it requires."""

    def config(self, **more: Any) -> RunConfig:
        """A checked configuration with this optimizer."""
        return check_source(
            Source(
                {
                    "name": "contract",
                    "model": {"path": "base"},
                    "data": {"dir": "images"},
                    "train": {"max_steps": HORIZON.num_updates},
                    "optimizer": {"type": self.name, **self.options, **more},
                }
            )
        )

    @property
    def row(self) -> OptimizerRow:
        return optimizer_row(self.name)

    def built(self, parameters: Sequence[torch.nn.Parameter], **more: Any) -> torch.optim.Optimizer:
        """The optimizer over all but the last parameter, and the last (if there are several) in another group."""
        groups = [parameters[:-1], parameters[-1:]] if len(parameters) > 1 else [parameters]
        return build_optimizer(self.config(**more).optimizer, groups, HORIZON)

    def train(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], updates: Iterable[int]
    ) -> None:
        """These updates as the trainer makes them, with gradients that are drawn by update and parameter."""
        for k in updates:
            for parameter, gradient in zip(parameters, _gradients(parameters, k), strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = self.config().optimizer.lr
            optimizer.step()

    def test_it_builds_over_groups_of_parameters(self) -> None:
        parameters = _parameters()
        optimizer = self.built(parameters)
        assert isinstance(optimizer, torch.optim.Optimizer)
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
        optimizer = self.built(parameters)
        for parameter, gradient in zip(parameters, _gradients(parameters, 0), strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
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
        resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
        after = self.built(resumed)
        after.load_state_dict(_through_a_checkpoint(before, after, set(type(self.config().optimizer).model_fields)))
        self.train(before, straight, range(3, 6))
        self.train(after, resumed, range(3, 6))
        assert _equal(straight, resumed)
        assert _equal(evaluated_weights(before) or [], evaluated_weights(after) or [])

    def test_nothing_is_kept_outside_of_state_and_param_groups(self) -> None:
        parameters = _parameters()
        optimizer = self.built(parameters)
        before = _attributes(optimizer)
        self.train(optimizer, parameters, range(3))
        assert _attributes(optimizer) == before

    def test_a_decoupled_decay_shrinks_by_lr_x_decay(self) -> None:
        if not self.row.decoupled_decay:
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
        if not self.row.element_wise:
            return
        apart, flat = _parameters(), torch.nn.Parameter(torch.cat([p.detach().flatten() for p in _parameters()]))
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
        low, high = self.row.usual_lr
        assert 0 < low < high
        assert list(unusual_rates(self.config())) == []

    def test_it_survives_the_saved_configuration(self) -> None:
        config = self.config()
        assert check_source(Source(YAML(typ="safe").load(to_yaml(config)))) == config


def _drawn(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _gradients(parameters: Sequence[torch.Tensor], k: int) -> list[torch.Tensor]:
    """Those of update k: some step may change them in place, so they are drawn anew each time."""
    return [_drawn(parameter.shape, seed=1000 * (k + 1) + index) for index, parameter in enumerate(parameters)]


def _parameters() -> list[torch.nn.Parameter]:
    """The same ones at every call."""
    return [torch.nn.Parameter(_drawn(shape, seed)) for seed, shape in enumerate(SHAPES)]


def _equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}


def _through_a_checkpoint(
    saved: torch.optim.Optimizer, fresh: torch.optim.Optimizer, options: set[str]
) -> dict[str, Any]:
    """The state to load: as saved, but for what the configuration says."""
    state, own = saved.state_dict(), fresh.state_dict()["param_groups"]
    tensors = {
        index: {k: v.clone() if isinstance(v, torch.Tensor) else json.loads(json.dumps(v)) for k, v in entries.items()}
        for index, entries in state["state"].items()
    }
    groups = []
    for theirs, ours in zip(state["param_groups"], own, strict=True):
        told = {k: v for k, v in ours.items() if k in options | {"params"}}
        groups.append(json.loads(json.dumps({k: v for k, v in theirs.items() if k not in told})) | told)
    return {"state": tensors, "param_groups": groups}
