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
from lora_trainer.config.trials import TrialConfig
from lora_trainer.diffusion.batch import Conditioning
from lora_trainer.models.adapters.bank import AdapterBank, peft_config
from lora_trainer.models.adapters.targets import select_targets
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.planning.prepare import prepare, prepare_like
from lora_trainer.runtime.launch import Launch
from lora_trainer.runtime.runtime import start_runtime
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.group import Member, TrialGroup
from lora_trainer.training.setup import Setup, set_up
from lora_trainer.training.trial import passes_of

Tensors = dict[str, torch.Tensor]
Train = Callable[..., tuple[Setup, dict[str, Tensors]]]

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
    return tuple(select_targets(shapes, targets, StableDiffusion.target_presets))


@pytest.fixture
def train(toy_config: Path) -> Train:
    """Updates of several trials in one group; their adapters afterwards, with the losses of the last update."""

    def run(
        trials: dict[str, Sequence[str]],
        *overrides: str,
        trials_per_pass: int = 1,
        num_steps: int = 5,
        exact: bool = False,
        before: Callable[[int, Setup], None] = lambda *_: None,
        precision: str = "fp32",
    ) -> tuple[Setup, dict[str, Tensors]]:
        shared = (f"train.max_steps={num_steps}", f"train.precision={precision}", *overrides)
        configs = [load_config(toy_config, [f"name={name}", *shared, *own]) for name, own in trials.items()]
        first = prepare(configs[0], Launch(), lambda items, *_: items)
        members = [Member(TrialConfig(each.name, each.name, {}, each), prepare_like(first, each)) for each in configs]
        group = TrialGroup("group", first.run_dir, tuple(members), trials_per_pass)
        with start_runtime(Launch(), precision, 1) as runtime:
            setup = set_up(group, runtime, MainConsole(silent=True), trials_per_pass=trials_per_pass)
            if exact:
                in_float64(setup)
            setup.optimizer_step.settle_scales(0)
            for k in range(num_steps):
                before(k, setup)
                setup.optimizer_step.run(k, stop_asked=False)
        adapters = {trial.name: setup.denoiser.bank.parameters(trial.adapter) for trial in setup.trials}
        return setup, {name: {k: p.detach() for k, p in weights.items()} for name, weights in adapters.items()}

    return run


def passes(setup: Setup) -> list[list[str]]:
    """The names of the trials in each forward."""
    return [[trial.name for trial in members] for members in passes_of(setup.trials, setup.trials_per_pass)]


def in_float64(setup: Setup) -> None:
    """Everything between the batch and the loss, and the adapters, in double precision."""
    setup.denoiser.bank.denoiser.double()
    for trial in setup.trials:
        if trial.average is not None:
            trial.average = {name: own.double() for name, own in trial.average.items()}
    family = setup.denoiser.family
    honest = family.predict

    def predict(_: Any, denoiser: Any, noisy: Any, timesteps: Any, conditioning: Conditioning) -> torch.Tensor:
        return honest(denoiser, noisy.double(), timesteps, conditioning.to(torch.float64))

    family.predict = types.MethodType(predict, family)  # type: ignore[method-assign]


def largest_difference(ours: Tensors, theirs: Tensors) -> float:
    """Relative to the largest entry of each tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in ours)


@pytest.mark.parametrize("targets", ["attention", "transformer+resnet", "all-linear"])
def test_the_packed_forward_equals_pefts(targets: str) -> None:
    unet = toy_unet().double()
    layers = layers_of(unet, targets)
    configs = [LoraConfig(rank=r, alpha=a, use_rslora=s) for r, a, s in [(4, 8, False), (2, 3, True), (7, 1, False)]]
    specs = {f"t{index}": peft_config(config, layers) for index, config in enumerate(configs)}
    specs["fewer"] = peft_config(LoraConfig(rank=3), layers[::2])
    bank = AdapterBank(unet, "unet", specs, seed=0)
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
    setup, packed = train(SIX, *shared, trials_per_pass=6, num_steps=15, exact=True)
    assert passes(setup) == [list(SIX)]
    for name, own in SIX.items():
        solo, alone = train({name: own}, *shared, num_steps=15, exact=True)
        assert largest_difference(packed[name], alone[name]) < 1e-10
        assert largest_difference(setup.trials[int(name[-1])].weights(), solo.trials[0].weights()) < 1e-10


def test_one_trial_per_pass_is_the_solo_run_to_the_bit(train: Train) -> None:
    _, group = train(SIX)
    for name, own in SIX.items():
        _, alone = train({name: own})
        assert all(torch.equal(group[name][key], alone[name][key]) for key in group[name])


def test_gradient_checkpointing_changes_nothing_in_a_packed_pass(train: Train) -> None:
    _, plain = train(SIX, trials_per_pass=6, num_steps=2)
    _, saved = train(SIX, "train.gradient_checkpointing=true", trials_per_pass=6, num_steps=2)
    for name in SIX:
        assert all(torch.equal(plain[name][key], saved[name][key]) for key in plain[name])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_packed_trials_train_in_half_precision_with_weights_in_fp32(train: Train, precision: str) -> None:
    two = {name: SIX[name] for name in ("trial1", "trial3")}
    setup, packed = train(two, trials_per_pass=2, precision=precision)
    assert setup.denoiser.bank.denoiser.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert [trial.scaler.is_enabled() for trial in setup.trials] == [precision == "fp16"] * 2
    for name, own in two.items():
        _, alone = train({name: own}, precision=precision)
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
    setup, group = train(trials, trials_per_pass=4, num_steps=3)
    assert passes(setup) == [["plain", "wide"], ["dora"], ["dropout"]]
    for name in ("dora", "dropout"):
        _, alone = train({name: trials[name]}, num_steps=3)
        assert all(torch.equal(group[name][key], alone[name][key]) for key in group[name])


@pytest.mark.parametrize("trials_per_pass", [1, 3])
def test_a_failing_trial_is_dropped_and_the_others_are_untouched(train: Train, trials_per_pass: int) -> None:
    three = {name: SIX[name] for name in ("trial0", "trial1", "trial2")}

    def poison(k: int, setup: Setup) -> None:
        if k == 2:
            next(iter(setup.trials[1].parameters.values())).data.view(-1)[0] = float("inf")

    _, healthy = train(three, trials_per_pass=trials_per_pass, num_steps=7)
    setup, rest = train(three, trials_per_pass=trials_per_pass, num_steps=7, before=poison)
    ending = setup.trials[1].ending
    assert ending is not None
    assert (ending.step, ending.status) == (5, "failed")
    assert ending.reason.startswith("its loss was not finite in 3 updates in a row; images ")
    assert [trial.is_live for trial in setup.trials] == [True, False, True]
    for name in ("trial0", "trial2"):
        assert all(torch.equal(rest[name][key], healthy[name][key]) for key in healthy[name])


def test_probes_of_a_packed_pass_equal_those_of_single_trials(train: Train) -> None:
    watched = "validation={fraction: 0.34, max_cost: 1.0}"
    setup, _ = train(SIX, watched, trials_per_pass=6)
    assert setup.validation is not None
    validator = setup.validation.validator
    together = validator.measure({trial.adapter: trial.weights() for trial in setup.trials})
    for trial in setup.trials:
        (alone,) = validator.measure({trial.adapter: trial.weights()}).values()
        for probe, reading in together[trial.adapter].items():
            assert reading.items == pytest.approx(alone[probe].items, rel=1e-5)
    assert len({reading["held_out"].relative for reading in together.values()}) == 6
