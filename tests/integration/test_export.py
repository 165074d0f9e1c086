"""The files change the denoiser's output as the live adapter does, in stock diffusers and by kohya's formula."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from lora_trainer.cli.export import export_run
from lora_trainer.config.load import load_config
from lora_trainer.errors import NumericStop
from lora_trainer.lora_files.files import lost_to_dtype, read_recipe, write_lora
from lora_trainer.models.adapters.bank import AdapterBank, peft_config
from lora_trainer.models.registry import open_base, open_family
from lora_trainer.storage.checkpoint import open_checkpoint
from lora_trainer.training.resume import stored_trial

TOLERANCE = 1e-5
VARIANTS = {
    "plain": {},
    "alpha": {"alpha": 1.5},
    "rslora": {"alpha": 8, "use_rslora": True},
    "locon": {"alpha": 2, "targets": "transformer+resnet"},
    "linear": {"targets": "all-linear"},
    "patterns": {"targets": ["attn2.to_k", "conv_out", "time_embedding.linear_1"]},
    "dora": {"alpha": 2, "targets": "transformer+resnet", "use_dora": True},
}


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(5)
    noisy, embeds = torch.randn(2, 4, 8, 8, generator=stream), torch.randn(2, 16, 16, generator=stream)
    return noisy, torch.tensor([10, 700]), embeds


def output(unet: UNet2DConditionModel, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.no_grad():
        return unet.eval()(*inputs).sample


def live_output(run_dir: Path, base: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The denoiser with the run's last adapter injected by peft."""
    config = load_config(run_dir / "config.yaml")
    _, state = stored_trial(open_checkpoint(run_dir / "checkpoints", None))
    adapter = state["adapter"]
    unet = UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False)
    layers = sorted({name.rpartition(".lora_")[0].removeprefix("unet.") for name in adapter})
    bank = AdapterBank(unet, "unet", {"live": peft_config(config.adapter, list(layers))}, seed=0)
    bank.load("live", adapter)
    return output(unet, inputs)


def loaded_output(file: Path, base: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The denoiser with a LoRA file loaded by stock diffusers."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return output(pipeline.unet, inputs)


def by_kohyas_formula(file: Path, base: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """W + (alpha / rank) up @ down per layer and, with dora_scale, each output's norm set to it."""
    tensors = load_file(file)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    layers = {f"lora_unet_{name.replace('.', '_')}": module for name, module in unet.named_modules()}
    names = sorted({key.partition(".")[0] for key in tensors})
    for name in names:
        down, up, weight = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"], layers[name].weight
        scale = tensors[f"{name}.alpha"].item() / down.shape[0]
        changed = weight.data + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if f"{name}.dora_scale" in tensors:
            magnitude = tensors[f"{name}.dora_scale"]
            norm = changed.flatten(1).norm(dim=1).reshape(magnitude.shape)
            changed = changed * (magnitude / norm)
        weight.data.copy_(changed)
    return output(unet, inputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_files_act_like_the_live_adapter(
    variant: str, train_toy: Callable[..., Path], toy_base: Path, inputs: tuple[torch.Tensor, ...]
) -> None:
    overrides = [f"adapter.{key}={json.dumps(value)}" for key, value in VARIANTS[variant].items()]
    run_dir = train_toy(*overrides, "export.dtype=fp32", "optimizer.lr=1e-2", "train.max_steps=4")
    kohya, diffusers = run_dir / "toy.safetensors", run_dir / "diffusers" / "pytorch_lora_weights.safetensors"
    live = live_output(run_dir, toy_base, inputs)
    base = output(UNet2DConditionModel.from_pretrained(toy_base / "unet"), inputs)
    assert (live - base).abs().max() > 100 * TOLERANCE, "the adapter does nothing, so this test would show nothing"
    assert (loaded_output(diffusers, toy_base, inputs) - live).abs().max() <= TOLERANCE
    assert (by_kohyas_formula(kohya, toy_base, inputs) - live).abs().max() <= TOLERANCE
    if variant != "dora":  # diffusers drops dora_scale from kohya's layout
        assert (loaded_output(kohya, toy_base, inputs) - live).abs().max() <= TOLERANCE


def test_kohya_keys_and_metadata(
    train_toy: Callable[..., Path], tmp_path: Path, private_names: tuple[str, str]
) -> None:
    run_dir = train_toy("adapter.alpha=2", "lr_scheduler={type: linear, warmup_steps: 2}", "train.max_steps=3")
    with safe_open(run_dir / "toy.safetensors", framework="pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
        down = file.get_tensor("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight")
        alpha = file.get_tensor("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha")
    assert len(keys) == 3 * 32
    assert (tuple(down.shape), down.dtype, alpha.item()) == ((4, 32), torch.float16, 2.0)
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "2"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_lr_scheduler"] == "linear"
    assert metadata["ss_steps"] == "3"
    recipe = read_recipe(metadata)
    assert recipe is not None
    assert recipe.lr_scheduler.model_dump()["warmup_steps"] == 2
    header = json.dumps(metadata)
    for private in (str(tmp_path), *private_names, "/tmp", "picture"):
        assert private not in header, private


def test_rslora_alpha_is_what_a_reader_divides_by_rank(train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy("adapter.alpha=3", "adapter.use_rslora=true", "train.max_steps=3")
    alphas = [t.item() for name, t in load_file(run_dir / "toy.safetensors").items() if name.endswith(".alpha")]
    assert len(alphas) == 32
    assert alphas == pytest.approx([3 * 4**0.5] * 32)
    with safe_open(run_dir / "toy.safetensors", framework="pt") as file:
        assert file.metadata()["ss_network_alpha"] == "3"


def test_numbered_exports_and_dtypes(train_toy: Callable[..., Path]) -> None:
    run_dir = train_toy(
        "export.every_steps=2", "export.dtype=bf16", "checkpoint.every_steps=2", "lr_scheduler={type: constant}"
    )
    assert sorted(f.name for f in run_dir.glob("toy*.safetensors")) == [
        "toy-step00000002.safetensors",
        "toy-step00000004.safetensors",
        "toy.safetensors",
    ]
    tensors = load_file(run_dir / "toy-step00000002.safetensors")
    assert {t.dtype for name, t in tensors.items() if not name.endswith(".alpha")} == {torch.bfloat16}


def test_what_is_not_finite_is_never_saved(toy_base: Path, train_toy: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = train_toy("train.max_steps=3")
    with safe_open(run_dir / "toy.safetensors", framework="pt") as file:
        recipe = read_recipe(file.metadata())
    assert recipe is not None
    family = open_family(open_base(str(toy_base)))
    adapter = {"unet.x.lora_A.weight": torch.zeros(4, 8), "unet.x.lora_B.weight": torch.full((8, 4), 1e6)}
    with pytest.raises(NumericStop, match="fp16's range"):
        write_lora(tmp_path / "x.safetensors", adapter, recipe, family, layout="kohya", dtype="fp16")
    adapter["unet.x.lora_B.weight"][0, 0] = float("nan")
    for layout in ("kohya", "diffusers"):
        with pytest.raises(NumericStop, match="never saved"):
            write_lora(tmp_path / "x.safetensors", adapter, recipe, family, layout=layout, dtype="fp32")
    assert not (tmp_path / "x.safetensors").exists()


def test_what_the_dtype_loses_is_said_and_its_fix_keeps_it(
    train_toy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("optimizer.lr=1e-8", "train.max_steps=2", "lr_scheduler={type: constant}")
    run_dir = train_toy(*small)
    said = re.search(r"([\d.]+)% of the weights in lora_B .* write (export\.dtype=\w+)", capsys.readouterr().out)
    assert said is not None
    exact, kept = tmp_path / "exact.safetensors", load_file(run_dir / "toy.safetensors")
    export_run(run_dir, None, "kohya", "fp32", "exported", exact)
    ups = {key: tensor for key, tensor in load_file(exact).items() if key.endswith("lora_up.weight")}
    lost = sum(int(((tensor - kept[key]).abs() > 0.1 * tensor.abs()).sum()) for key, tensor in ups.items())
    share = lost / sum(int(tensor.count_nonzero()) for tensor in ups.values())
    assert float(said[1]) == pytest.approx(100 * share, abs=0.1)
    export_run(run_dir, None, "kohya", "fp16", "exported", tmp_path / "again.safetensors")
    assert "lora_B" in capsys.readouterr().out
    train_toy(*small, said[2], name="fixed")
    export_run(run_dir, None, "kohya", said[2].rpartition("=")[2], "exported", tmp_path / "better.safetensors")
    assert "lost" not in capsys.readouterr().out


@pytest.mark.parametrize(("size", "share"), [(1e-3, 0.0), (2e-5, 0.0), (1e-7, 0.639)])
def test_a_weight_is_lost_that_changes_by_over_a_tenth(size: float, share: float) -> None:
    """Between fp16's smallest number, 6e-8, and its multiples."""
    values = torch.linspace(0.5, 1.5, 10_001) * size
    note = lost_to_dtype({"unet.x.lora_A.weight": values, "unet.x.lora_B.weight": torch.zeros(4)}, "fp16")
    assert (note is None) == (share == 0)
    if note:
        assert float(note.partition("%")[0]) == pytest.approx(100 * share, abs=0.2)
    assert lost_to_dtype({"unet.x.lora_A.weight": values}, "bf16") is None
