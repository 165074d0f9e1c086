"""What must not change a run: the split of the batch, samples, exports, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from lora_trainer.schedules.registry import CLASSIC
from lora_trainer.tracking.metrics import read_rows, step_rows

SPLIT_4x1 = ("train.batch_size=4", "train.gradient_accumulation_steps=1")
SPLIT_2x2 = ("train.batch_size=2", "train.gradient_accumulation_steps=2")
SPLIT_1x4 = ("train.batch_size=1", "train.gradient_accumulation_steps=4")


def closeness(one: Path, two: Path) -> float:
    """Largest difference of two LoRA files, relative to the largest value."""
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    largest = max(float(t.float().abs().max()) for t in first.values())
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first) / largest


@pytest.mark.parametrize("split", [SPLIT_2x2, SPLIT_1x4])
def test_the_split_of_the_batch_changes_nothing_but_rounding(
    train_toy: Callable[..., Path], split: tuple[str, ...]
) -> None:
    common = ("export.dtype=fp32", "data.captions.dropout=0.5", "data.flip=true", "train.max_steps=5")
    whole = train_toy(*SPLIT_4x1, *common, name="whole")
    parts = train_toy(*split, *common, name="parts")
    assert closeness(whole / "whole.safetensors", parts / "parts.safetensors") < 1e-3
    for one, two in zip(step_rows(whole / "metrics.jsonl"), step_rows(parts / "metrics.jsonl"), strict=True):
        assert one["lr"] == two["lr"]
        assert one["epoch"] == two["epoch"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_an_update_is_the_mean_over_its_real_samples(train_toy: Callable[..., Path]) -> None:
    """Six images at a global batch of four: the second update of each epoch has two samples, in any split."""
    runs = {}
    for name, split in {"whole": SPLIT_4x1, "parts": SPLIT_1x4}.items():
        run_dir = train_toy(*split, "train.max_steps=4", name=name)
        runs[name] = [row["loss"] for row in step_rows(run_dir / "metrics.jsonl")]
    assert runs["whole"] == pytest.approx(runs["parts"], rel=1e-5)


@pytest.mark.parametrize("name", CLASSIC)
def test_the_lr_in_the_log_is_diffusers_lr_at_every_step(train_toy: Callable[..., Path], name: str) -> None:
    warmup = 0 if name == "constant" else 3
    options = {"type": name} | ({"warmup_steps": warmup} if warmup else {})
    written = "{" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "}"
    run_dir = train_toy(f"lr_scheduler={written}", "train.max_steps=10", *SPLIT_1x4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10, num_cycles=3)
    logged = [row["lr"] for row in step_rows(run_dir / "metrics.jsonl")]
    assert len(logged) == 10
    for lr in logged:
        assert abs(lr - optimizer.param_groups[0]["lr"]) < 1e-12
        optimizer.step()
        theirs.step()


def test_the_lr_in_the_log_is_the_one_the_optimizer_used(
    train_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    honest = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        used.extend(group["lr"] for group in self.param_groups)
        return honest(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run_dir = train_toy("lr_scheduler={type: linear, warmup_steps: 2}")
    assert [row["lr"] for row in step_rows(run_dir / "metrics.jsonl")] == used
    assert len(used) == 6


def test_samples_and_exports_do_not_touch_the_training(train_toy: Callable[..., Path]) -> None:
    quiet = train_toy("adapter.dropout=0.2", name="quiet")
    busy = train_toy(
        "adapter.dropout=0.2",
        "sample={prompts: [a, {prompt: b, negative_prompt: c, seed: 3}], every_steps: 1, num_inference_steps: 2}",
        "export.every_steps=2",
        "checkpoint.every_steps=1",
        "tracking.tensorboard=true",
        name="busy",
    )
    assert closeness(quiet / "quiet.safetensors", busy / "busy.safetensors") == 0
    assert len(list((busy / "samples").glob("step-*.png"))) == 2 * 7
    assert (busy / "samples" / "grid.png").is_file()
    assert (busy / "curves.png").is_file()
    assert list((busy / "tensorboard").glob("events.*"))
    steps = [row["step"] for row in read_rows(busy / "metrics.jsonl") if row.get("event") == "sample"]
    assert steps == [0, 1, 2, 3, 4, 5, 6]


def test_gradient_checkpointing_changes_nothing_but_rounding(train_toy: Callable[..., Path]) -> None:
    plain = train_toy("export.dtype=fp32", name="plain")
    recomputed = train_toy("export.dtype=fp32", "train.gradient_checkpointing=true", name="recomputed")
    assert closeness(plain / "plain.safetensors", recomputed / "recomputed.safetensors") < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_fp32_adapters(train_toy: Callable[..., Path], precision: str) -> None:
    run_dir = train_toy(f"train.precision={precision}", "export.dtype=fp32", name="low")
    full = train_toy("export.dtype=fp32", name="full")
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    adapter = load_file(checkpoint / "adapter.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    losses = [[row["loss"] for row in step_rows(d / "metrics.jsonl")] for d in (run_dir, full)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_v_prediction_and_min_snr_train(train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy("model.prediction_type=v_prediction", "objective.min_snr_gamma=5", "adapter.use_dora=true")
    assert len(step_rows(run_dir / "metrics.jsonl")) == 6


def test_every_adapter_moves_after_the_second_update_with_a_learning_rate(train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy("adapter.targets=transformer+resnet", "train.max_steps=3", "lr_scheduler={type: constant}")
    first = train_toy(
        "adapter.targets=transformer+resnet", "train.max_steps=1", "lr_scheduler={type: constant}", name="first"
    )
    now = load_file(next((run_dir / "checkpoints").iterdir()) / "adapter.safetensors")
    then = load_file(next((first / "checkpoints").iterdir()) / "adapter.safetensors")
    for name, tensor in now.items():
        assert not torch.equal(tensor, then[name.replace("toy/", "first/")]), name
    moved = [name for name, tensor in then.items() if "lora_B" in name and tensor.abs().max() == 0]
    assert not moved
