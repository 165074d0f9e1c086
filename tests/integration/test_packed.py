"""Packed trials against peft's own forward and against separate runs."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import toy_unet

from lora_trainer.config.load import load_config
from lora_trainer.config.schema import LoraConfig
from lora_trainer.models.adapters.bank import AdapterBank, AdapterSpec
from lora_trainer.models.adapters.targets import select_targets
from lora_trainer.planning.prepare import prepare
from lora_trainer.runtime.launch import Launch
from lora_trainer.runtime.runtime import start_runtime
from lora_trainer.tracking.console import Screen
from lora_trainer.training.setup import Assembly, assemble
from lora_trainer.training.trial import Ending, TrialSpec

Tensors = dict[str, torch.Tensor]
Train = Callable[..., tuple[Assembly, dict[str, Tensors]]]

SIX = {
    f"trial{index}": (
        f"optimizer.lr={lr}",
        f"optimizer.weight_decay={0.01 * index}",
        f"adapter.rank={rank}",
        f"adapter.use_rslora={str(index % 2 == 0).lower()}",
        f"train.max_grad_norm={0.01 * 2**index}",
        "adapter.targets=transformer+resnet",
        f"lr_scheduler={{type: {schedule}}}",
    )
    for index, (lr, rank, schedule) in enumerate(
        [
            (1e-4, 4, "constant"),
            (3e-4, 4, "cosine"),
            (1e-3, 2, "linear"),
            (2e-3, 8, "rex"),
            (5e-3, 1, "cosine"),
            (1e-2, 3, "constant"),
        ]
    )
}


def layers_of(unet: torch.nn.Module, targets: str) -> tuple[str, ...]:
    shapes = {
        n: tuple(m.weight.shape) for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    return tuple(select_targets(shapes, targets))


@pytest.fixture
def train(toy_config: Path) -> Train:
    """Updates of several trials in one group; their adapters afterwards, with the losses of the last update."""

    def run(
        trials: dict[str, Sequence[str]],
        *overrides: str,
        trials_per_pass: int = 1,
        num_updates: int = 5,
        exact: bool = False,
        before: Callable[[int, Assembly], None] = lambda *_: None,
        precision: str = "fp32",
    ) -> tuple[Assembly, dict[str, Tensors]]:
        shared = (f"train.max_steps={num_updates}", *overrides)
        specs = [TrialSpec(name, load_config(toy_config, [*shared, *own])) for name, own in trials.items()]
        prepared = prepare(specs[0].config, Launch(), lambda items, *_: items)
        with start_runtime(prepared.launch, precision, 1) as runtime:
            parts = assemble(
                prepared, specs, runtime, Screen(silent=True), trials_per_pass=trials_per_pass, drop_failed=True
            )
            if exact:
                in_float64(parts)
            for step in range(num_updates):
                before(step, parts)
                parts.updater.run(step, step, stop_asked=False)
        return parts, {trial.name: parts.bank.state(trial.adapter) for trial in parts.trials}

    return run


def in_float64(parts: Assembly) -> None:
    """Everything between the batch and the loss, and the adapters, in double precision."""
    parts.denoiser.double()
    for trial in parts.trials:
        if trial.average is not None:
            trial.average.tensors = {name: own.double() for name, own in trial.average.tensors.items()}
    honest = parts.family.predict

    def predict(_: Any, denoiser: Any, noisy: Any, timesteps: Any, said: Any) -> torch.Tensor:
        return honest(denoiser, noisy.double(), timesteps, type(said)(said.prompt_embeds_BLD.double()))

    parts.family.predict = types.MethodType(predict, parts.family)  # type: ignore[method-assign]


def largest_difference(ours: Tensors, theirs: Tensors) -> float:
    """Relative to the largest entry of each tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in ours)


@pytest.mark.parametrize("targets", ["attention", "transformer+resnet", "all-linear"])
def test_the_packed_forward_equals_pefts(targets: str) -> None:
    unet = toy_unet().double()
    layers = layers_of(unet, targets)
    configs = [LoraConfig(rank=r, alpha=a, use_rslora=s) for r, a, s in [(4, 8, False), (2, 3, True), (7, 1, False)]]
    specs = {f"t{index}": AdapterSpec(config, layers) for index, config in enumerate(configs)}
    specs["fewer"] = AdapterSpec(LoraConfig(rank=3), layers[::2])
    bank = AdapterBank.attach(unet, specs, seed=0)
    unet.double()
    generator = torch.Generator().manual_seed(0)
    for name in specs:
        for parameter in bank.parameters(name).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    said = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([10, 700])
    alone, gradients = [], []
    for name in specs:
        with bank.active([name]):
            alone.append(unet(x, timesteps, said).sample)
            alone[-1].square().sum().backward()
        gradients.append({k: p.grad.clone() for k, p in bank.parameters(name).items()})
        unet.zero_grad()
    with bank.active(list(specs)):
        together = unet(x.repeat(4, 1, 1, 1), timesteps.repeat(4), said.repeat(4, 1, 1)).sample
        together.square().sum().backward()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    for name, own in zip(specs, gradients, strict=True):
        packed = {k: p.grad for k, p in bank.parameters(name).items()}
        assert largest_difference(packed, own) < 1e-10
    with bank.active(["t1"]):
        torch.testing.assert_close(unet(x, timesteps, said).sample, alone[1], rtol=0, atol=0)


def test_six_packed_trials_equal_six_separate_runs(train: Train) -> None:
    """Six LRs, ranks, schedules, weight decays and clips; 15 clipped AdamW updates in float64."""
    shared = ("train.gradient_accumulation_steps=2", "train.ema_decay=0.9")
    parts, packed = train(SIX, *shared, trials_per_pass=6, num_updates=15, exact=True)
    assert [len(members) for members in parts.passes] == [6]
    for name, own in SIX.items():
        solo, alone = train({name: own}, *shared, num_updates=15, exact=True)
        assert largest_difference(packed[name], alone[name]) < 1e-10
        assert largest_difference(parts.trials[int(name[-1])].weights(), solo.trials[0].weights()) < 1e-10


def test_one_trial_per_pass_is_the_solo_run_to_the_bit(train: Train) -> None:
    _, group = train(SIX)
    for name, own in SIX.items():
        _, alone = train({name: own})
        assert all(torch.equal(group[name][key], alone[name][key]) for key in group[name])


def test_gradient_checkpointing_changes_nothing_in_a_packed_pass(train: Train) -> None:
    _, plain = train(SIX, trials_per_pass=6, num_updates=2)
    _, saved = train(SIX, "train.gradient_checkpointing=true", trials_per_pass=6, num_updates=2)
    for name in SIX:
        assert all(torch.equal(plain[name][key], saved[name][key]) for key in plain[name])


def test_packed_trials_train_in_bf16_with_weights_in_fp32(train: Train) -> None:
    two = {name: SIX[name] for name in ("trial1", "trial3")}
    parts, packed = train(two, trials_per_pass=2, precision="bf16")
    assert parts.denoiser.dtype == torch.bfloat16
    for name, own in two.items():
        _, alone = train({name: own}, precision="bf16")
        solo = torch.cat([t.flatten() for key, t in alone[name].items() if "lora_B" in key])
        moved = torch.cat([t.flatten() for key, t in packed[name].items() if "lora_B" in key])
        assert moved.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(moved, solo, dim=0) > 0.95


def test_dora_and_dropout_run_alone(train: Train) -> None:
    trials = {
        "plain": (),
        "dora": ("adapter.use_dora=true",),
        "dropout": ("adapter.dropout=0.1",),
        "wide": ("adapter.rank=8",),
    }
    parts, group = train(trials, trials_per_pass=4, num_updates=3)
    assert [[trial.name for trial in members] for members in parts.passes] == [["plain", "wide"], ["dora"], ["dropout"]]
    for name in ("dora", "dropout"):
        _, alone = train({name: trials[name]}, num_updates=3)
        assert all(torch.equal(group[name][key], alone[name][key]) for key in group[name])


@pytest.mark.parametrize("trials_per_pass", [1, 3])
def test_a_failing_trial_is_dropped_and_the_others_are_untouched(train: Train, trials_per_pass: int) -> None:
    three = {name: SIX[name] for name in ("trial0", "trial1", "trial2")}

    def poison(step: int, parts: Assembly) -> None:
        if step == 2:
            weights = next(iter(parts.bank.parameters(parts.trials[1].adapter).values()))
            weights.data.view(-1)[0] = float("inf")

    _, healthy = train(three, trials_per_pass=trials_per_pass)
    parts, rest = train(three, trials_per_pass=trials_per_pass, before=poison)
    assert parts.trials[1].ending == Ending(2, "failed", "its loss was not finite")
    assert [trial.is_live for trial in parts.trials] == [True, False, True]
    for name in ("trial0", "trial2"):
        assert all(torch.equal(rest[name][key], healthy[name][key]) for key in healthy[name])


def test_probes_of_a_packed_pass_equal_those_of_single_trials(train: Train) -> None:
    watched = "validation={fraction: 0.34, max_cost: 1.0}"
    parts, _ = train(SIX, watched, trials_per_pass=6)
    assert parts.validator is not None
    together = parts.validator.measure_packed({trial.adapter: trial.weights() for trial in parts.trials})
    for trial, readings in zip(parts.trials, together, strict=True):
        alone = parts.validator.measure(trial.adapter, trial.weights())
        for probe, reading in readings.items():
            assert reading.items == pytest.approx(alone[probe].items, rel=1e-5)
    assert len({reading["held_out"].relative for reading in together}) == 6
