"""The probe against a closed form, against itself, and inside the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from lora_trainer.config.schema import ValidationConfig
from lora_trainer.data.batches import PromptStore
from lora_trainer.diffusion.batch import Conditioning, ProbeItems
from lora_trainer.diffusion.noise_paths import noise_path
from lora_trainer.evidence.statistics.paired import rise_in_se
from lora_trainer.runtime.launch import Launch
from lora_trainer.schedules.schedule import PlateauFeedback
from lora_trainer.tracking.metrics import read_rows, step_rows
from lora_trainer.training.denoiser import AdaptedDenoiser
from lora_trainer.training.validation import ProbeReading, Validator

CPU = torch.device("cpu")
SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
WATCHED = "validation={fraction: 0.3, every_steps: 2, max_cost: 1.0}"


class GaussianWorld:
    """Latents with a known spectrum, for which the best possible denoiser and its loss are known in closed form."""

    def __init__(self, num_items: int, error: float = 0.0) -> None:
        self.alphas = DDPMScheduler(**SD_NOISE).alphas_cumprod
        self.spectrum = torch.logspace(1, -2, 256).reshape(4, 8, 8)
        self.error = error
        stream = torch.Generator().manual_seed(1)
        latents = torch.randn(num_items, 4, 8, 8, generator=stream) * self.spectrum.sqrt()
        keys = tuple(f"item{index}" for index in range(num_items))
        self.items = ProbeItems(keys, latents, {}, ("",) * num_items)

    def predict(self, _: object, noisy: torch.Tensor, timesteps: torch.Tensor, __: Conditioning) -> torch.Tensor:
        """E[noise | noisy latents], with its gain off by `error`."""
        alpha = self.alphas[timesteps, None, None, None]
        total = alpha * self.spectrum + 1 - alpha
        return (1 + self.error) * (1 - alpha).sqrt() / total * noisy

    def closed_form(self) -> float:
        """Mean loss over all 1000 timesteps: Var[noise | noisy], plus the error's square."""
        alpha = self.alphas[:, None, None, None].double()
        total = alpha * self.spectrum.double() + 1 - alpha
        variance = alpha * self.spectrum / total
        return float((variance + self.error**2 * (1 - alpha) / total).mean())


class NoBank:
    """A bank whose adapters change nothing."""

    denoiser = torch.nn.Identity()

    @contextmanager
    def _as_it_is(self, *_: object) -> Any:
        yield

    active = swapped = disabled = _as_it_is


class OneProcess:
    launch, device = Launch(), CPU

    def autocast(self) -> Any:
        return nullcontext()

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return values


def validator(world: GaussianWorld, seed: int = 0, batch_size: int = 64, items: ProbeItems | None = None) -> Validator:
    path = noise_path(SD_NOISE, "epsilon", {}, CPU)
    prompts = PromptStore({}, {"": 0})
    probes = {"held_out": items or world.items}
    parts: Any = (world, NoBank(), path, OneProcess())
    config = ValidationConfig(fraction=0.1, seed=seed, batch_size=batch_size)
    return Validator(AdaptedDenoiser(*parts), probes, prompts, config)


def losses(world: GaussianWorld, **options: Any) -> np.ndarray:
    return validator(world, **options).base()["held_out"]


def test_the_mean_is_within_one_percent_of_the_closed_form() -> None:
    for error in (0.0, 0.3):
        world = GaussianWorld(200, error)
        assert losses(world).mean() == pytest.approx(world.closed_form(), rel=0.01)


def test_strata_are_midpoints() -> None:
    path = noise_path(SD_NOISE, "epsilon", {}, CPU)
    assert path.strata(16) == [31, 93, 156, 218, 281, 343, 406, 468, 531, 593, 656, 718, 781, 843, 906, 968]


def test_pairing_lifts_the_signal_at_least_tenfold() -> None:
    """Two nearby models, 2 images: the difference against its spread over probe seeds, paired and unpaired."""
    better, worse = GaussianWorld(2), GaussianWorld(2, error=0.02)
    paired = [losses(worse, seed=s).mean() - losses(better, seed=s).mean() for s in range(24)]
    unpaired = [losses(worse, seed=s).mean() - losses(better, seed=s + 100).mean() for s in range(24)]
    signal = [abs(np.mean(values)) / np.std(values) for values in (paired, unpaired)]
    assert np.std(unpaired) > 10 * np.std(paired)
    assert signal[0] > 10 * signal[1]


def test_a_repeat_is_bit_equal_and_the_batch_size_does_not_matter() -> None:
    world = GaussianWorld(5)
    first = losses(world)
    assert np.array_equal(first, losses(world))
    for batch_size in (1, 3, 80):
        assert np.abs(losses(world, batch_size=batch_size) - first).max() < 1e-6
    assert not np.array_equal(first, losses(world, seed=1))


def test_the_order_of_the_images_does_not_matter() -> None:
    world = GaussianWorld(6)
    order = [3, 0, 5, 1, 4, 2]
    items = world.items
    shuffled = ProbeItems(
        tuple(items.keys[i] for i in order),
        items.latents_NChw[order],
        {},
        items.prompts,
    )
    assert np.allclose(losses(world, items=shuffled), losses(world)[order], rtol=0, atol=1e-6)


def test_readings_are_relative_to_the_base_stratum_by_stratum() -> None:
    base = np.outer([1.0, 3.0], np.linspace(1, 0.01, 16))
    same = ProbeReading(base, base)
    assert same.relative == pytest.approx(1.0)
    assert same.gain_se == 0
    assert same.bands == pytest.approx([1.0] * 4)
    late = base.copy()
    late[:, 12:] *= 0.5  # an improvement where the loss itself is tiny
    reading = ProbeReading(late, base)
    assert reading.relative == pytest.approx(1 - 0.5 / 4)
    assert reading.bands == pytest.approx([1, 1, 1, 0.5])


def events(run_dir: Path, name: str, **fields: Any) -> list[Mapping[str, Any]]:
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == name]
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


def test_validation_does_not_touch_the_training(train_toy: Callable[..., Path], tmp_path: Path) -> None:
    from toys import write_images

    held_out, prior = write_images(tmp_path / "held", num=9), write_images(tmp_path / "prior", num=12)
    for index in range(6):
        (held_out / f"{index:02d}.png").unlink()
    blind = train_toy("adapter.dropout=0.1", "tracking.base_loss_every=null", name="blind")
    watched = train_toy(
        "adapter.dropout=0.1",
        f"validation={{dir: '{held_out}', prior_dir: '{prior}', every_steps: 1, max_cost: 1.0}}",
        name="watched",
    )
    one = (blind / "blind.safetensors").read_bytes()
    two = (watched / "watched.safetensors").read_bytes()
    header = int.from_bytes(one[:8], "little")
    assert one[8 + header :] == two[8 + int.from_bytes(two[:8], "little") :]
    assert {row["probe"] for row in events(watched, "validation")} == {"held_out", "train", "prior"}
    assert [row["step"] for row in events(watched, "validation", probe="prior")] == [0, 1, 2, 3, 4, 5, 6]


def test_the_ratio_to_the_base_is_exactly_one_before_b_moves(train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy("lr_scheduler={type: linear, warmup_steps: 2}", "tracking.base_loss_every=1")
    ratios = [row["ratio"] for row in step_rows(run_dir / "metrics.jsonl")]
    assert ratios[:2] == [1.0, 1.0]  # update 0 has LR 0, so update 1 still sees B = 0
    assert all(ratio != 1.0 for ratio in ratios[2:])
    sparse = train_toy("tracking.base_loss_every=4", name="sparse")
    assert [row["step"] for row in step_rows(sparse / "metrics.jsonl") if "ratio" in row] == [1, 5]


def test_runs_that_differ_in_schedule_alone_see_the_same(train_toy: Callable[..., Path]) -> None:
    def draws(name: str, *overrides: str) -> list[str]:
        return [row["draws"] for row in step_rows(train_toy(*overrides, name=name) / "metrics.jsonl")]

    one = draws("one", "lr_scheduler={type: constant}")
    assert one == draws("two", "lr_scheduler={type: cosine}", "optimizer.lr=3e-3", "adapter.rank=2")
    assert len(set(one)) == len(one)
    assert not set(one) & set(draws("three", "seed=5"))


def test_the_best_lora_is_kept_by_the_probe(train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy(WATCHED, "optimizer.lr=2e-3")
    readings = events(run_dir, "validation", probe="held_out")
    assert [row["step"] for row in readings] == [0, 2, 4, 6]
    assert readings[0]["relative"] == pytest.approx(1, abs=1e-12)
    assert readings[-1]["relative"] < 1.0
    assert (run_dir / "toy-best.safetensors").is_file()
    again = train_toy(WATCHED, "validation.keep_best=false", name="without")
    assert not (again / "without-best.safetensors").exists()


def test_a_plateau_reduces_after_patience_probes_without_clear_improvement() -> None:
    feedback = PlateauFeedback(factor=0.5, patience=2, threshold_se=2.0, min_ratio=0.2)
    probes = [
        [1.0, 1.1],
        [0.9, 1.0],
        [0.9001, 0.9999],
        [0.91, 0.99],
        [0.8, 0.9],
        [0.8, 0.9],
        [0.8, 0.9],
        [0.8, 0.9],
        [0.8, 0.9],
    ]
    reduced = [feedback.observe(10 * number, items, rise_in_se) for number, items in enumerate(probes)]
    assert reduced == [False, False, False, True, False, False, True, False, True]
    assert feedback.reductions == [30, 60, 80]
    assert [feedback.multiplier(k, 1.0) for k in (0, 29, 30, 60, 80)] == [1, 1, 0.5, 0.25, 0.2]


def test_a_probe_that_is_not_finite_is_no_plateaus_best() -> None:
    feedback = PlateauFeedback(factor=0.5, patience=2, threshold_se=2.0, min_ratio=0.2)
    for step, value in enumerate((float("inf"), 1.0, float("nan"))):
        assert not feedback.observe(step, [value, 1.0], rise_in_se)
    assert feedback.state() == {"reductions": [], "best": [1.0, 1.0], "bad": 1}


def test_a_plateau_in_the_loop_is_recorded_and_moves_the_lr(train_toy: Callable[..., Path]) -> None:
    plateau = "lr_scheduler={type: plateau, patience: 1, threshold_se: 1000, factor: 0.1}"
    run_dir = train_toy(plateau, "validation={fraction: 0.3, every_steps: 2, max_cost: 1.0}", "train.max_steps=8")
    assert [row["step"] for row in events(run_dir, "plateau")] == [4, 6, 8]
    lrs = [row["lr"] for row in step_rows(run_dir / "metrics.jsonl")]
    assert lrs == pytest.approx([1e-3] * 4 + [1e-4] * 2 + [1e-5] * 2)


def test_the_report_is_built_anew_from_the_run_directory_alone(train_toy: Callable[..., Path]) -> None:
    from lora_trainer.cli.report import report

    run_dir = train_toy(WATCHED, "sample={prompts: [picture 0], num_inference_steps: 2}")
    written = (run_dir / "report.html").read_bytes()
    (run_dir / "report.html").unlink()
    report([run_dir], None, 0.01)
    assert (run_dir / "report.html").read_bytes() == written
    held_out = events(run_dir, "validation", probe="held_out")[-1]["relative"]
    assert f"the held-out loss is {held_out:.4f} of the base" in written.decode()


def test_a_probe_that_is_not_finite_has_no_precision() -> None:
    losses = np.full((2, 16), np.inf)
    assert np.isnan(ProbeReading(losses, np.ones((2, 16))).gain_se)
