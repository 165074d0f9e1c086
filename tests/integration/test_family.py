"""Another package adds a model family unlike Stable Diffusion: it trains, resumes, sweeps and exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_resume import assert_same_run_twice
from toys import build_flow_base

from lora_trainer.cli.export import convert_file, export_run
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.models.registry import open_base, open_family
from lora_trainer.tracking.metrics import step_rows

FOLDER = Path(__file__).parents[1]
SAMPLED = "sample={prompts: [picture 1], num_inference_steps: 2, every_steps: 3}"
LAYERS = ("attention.to_k", "attention.to_q", "attention.to_v")


@pytest.fixture(scope="session")
def flow_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flow_base(tmp_path_factory.mktemp("flow"))


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point, as pip writes it."""
    metadata = tmp_path / "site" / "toy_family-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_family\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lora_trainer.families]\ntoy_flow = toy_family:ToyFlow\n")
    monkeypatch.syspath_prepend(metadata.parent)


@pytest.fixture
def train(flow_base: Path, train_toy: Callable[..., Path]) -> Callable[..., Path]:
    return lambda *overrides, **options: train_toy(f"model.path={flow_base}", *overrides, **options)


def test_it_is_no_longer_than_a_page() -> None:
    assert len((FOLDER / "toy_family.py").read_text().splitlines()) <= 80


def test_it_resumes_to_the_same_bytes(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rich = (SAMPLED, "data.crop=random", "data.flip=true", "train.ema_decay=0.9")
    assert_same_run_twice(train, monkeypatch, rich, stops=[2, 3])


def test_it_learns(train: Callable[..., Path]) -> None:
    run_dir = train("train.max_steps=60", "optimizer.lr=1e-2", "adapter.targets=all-linear")
    losses = [row["loss"] for row in step_rows(run_dir / "metrics.jsonl")]
    assert sum(losses[-12:]) < 0.95 * sum(losses[:12])


def test_its_file_joins_q_k_and_v(train: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = train("export.dtype=fp32", "adapter.use_dora=true", "adapter.alpha=2")
    own, joined = (
        load_file(run_dir / "diffusers" / "pytorch_lora_weights.safetensors"),
        load_file(run_dir / "toy.safetensors"),
    )
    kinds = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    assert set(own) == {f"transformer.{layer}.{kind}" for layer in LAYERS for kind in kinds}
    name = "lora_transformer_attention_qkv"
    assert set(joined) == {f"{name}.{kind}" for kind in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")}

    down, up, alpha = (joined[f"{name}.{kind}"] for kind in ("lora_down.weight", "lora_up.weight", "alpha"))
    downs, ups = ([own[f"transformer.attention.to_{part}.lora_{kind}.weight"] for part in "qkv"] for kind in ("A", "B"))
    expected = torch.cat([2 / 4 * up @ down for up, down in zip(ups, downs, strict=True)])
    torch.testing.assert_close(alpha / down.shape[0] * up @ down, expected)

    other = tmp_path / "diffusers.safetensors"
    convert_file(run_dir / "toy.safetensors", "diffusers", "fp32", None, other)
    assert other.read_bytes() == (run_dir / "diffusers" / "pytorch_lora_weights.safetensors").read_bytes()
    again = tmp_path / "again.safetensors"
    export_run(run_dir, None, "kohya", "fp32", "exported", again)
    assert again.read_bytes() == (run_dir / "toy.safetensors").read_bytes()
    with safe_open(again, "pt") as file:
        said = file.metadata()
    assert (said["modelspec.prediction_type"], said["modelspec.architecture"]) == ("flow_matching", "toy-flow/lora")


def test_part_of_q_k_and_v_is_refused_before_it_trains(train: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"2 of the 3 layers .* `lora_transformer_attention_qkv`[\s\S]*those beside"):
        train("adapter.targets=[to_q, to_k]")


def test_it_sweeps_and_draws(flow_base: Path, sweep: Callable[..., Path]) -> None:
    folder = sweep("{grid: {optimizer.lr: [1e-4, 1e-2]}, seeds: [1, 2]}", f"model.path={flow_base}", SAMPLED)
    files = sorted(folder.rglob("*.safetensors"))
    assert len([file for file in files if file.parent.name == "diffusers"]) == 4
    assert "lr0.01" in (folder / "report.html").read_text()
    assert len(list(folder.rglob("samples/*.png"))) == 4 * 4  # of steps 0, 3 and 6, and the grid


def test_what_only_betas_have_is_refused(train: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"min_snr_gamma[\s\S]*the base has none"):
        train("objective.min_snr_gamma=5")
    with pytest.raises(ModelError, match="`epsilon` does not fit the base's FlowMatchEulerDiscreteScheduler"):
        train("model.prediction_type=epsilon")


def test_pixels_fill_whole_latents(train: Callable[..., Path], train_toy: Callable[..., Path]) -> None:
    for start in (train, train_toy):
        with pytest.raises(ConfigError, match=r"510 is no multiple of 8[\s\S]*write 504 or 512"):
            start("data.resolution=510")


def test_another_family_than_the_bases_is_refused(train: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"model\.family is sd, but the base is toy_flow"):
        train("model.family=sd")
    with pytest.raises(ModelError, match=r"`flux` is no family[\s\S]*known: auto, toy_flow, sd"):
        train("model.family=flux")


def test_latents_are_shifted_scaled_and_decoded_back(flow_base: Path) -> None:
    family = open_family(open_base(str(flow_base)))
    vae = family.load_vae(torch.device("cpu"))
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, _ = family.encode_images(vae, pixels)
        torch.testing.assert_close(mean, (vae.encode(pixels).latent_dist.mean - 0.1) * 0.7)
        torch.testing.assert_close(family.decode(vae, mean), vae.decode(vae.encode(pixels).latent_dist.mean).sample)
