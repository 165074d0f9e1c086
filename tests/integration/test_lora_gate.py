"""What is no LoRA of this base is neither drawn with nor converted, and nobody's file is overwritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_trainer.cli import sample as sampling
from lora_trainer.cli.export import convert_file, export_run
from lora_trainer.cli.report import report
from lora_trainer.errors import ConfigError, ModelError, Problem, SystemSetupError, TrainerError
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.storage import safetensors_io

DOWN = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
UP = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"


def request(**changes: Any) -> sampling.SampleRequest:
    usual: dict[str, Any] = {"prompts": ("x",), "negative_prompt": "", "seed": 0, "num_images": 1}
    usual |= {"num_inference_steps": 1, "guidance_scale": 1.0, "lora_scale": 1.0, "size_px": 32}
    return sampling.SampleRequest(**{**usual, **changes})


def test_loras_are_judged_before_they_are_used(
    train_toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_toy("train.max_steps=3", "model.prediction_type=v_prediction", "sample={}")
    file, out = run / f"{run.name}.safetensors", tmp_path / "out.safetensors"
    tensors, metadata = safetensors_io.load(file)
    assert UP in tensors
    bad = {
        "NaN": tensors | {UP: torch.full_like(tensors[UP], torch.nan)},
        "infinite": tensors | {UP.replace("lora_up.weight", "alpha"): torch.tensor(torch.inf)},
        "lacks a half": {key: tensor for key, tensor in tensors.items() if key != UP},
        "shapes": tensors | {UP: tensors[UP][:-1]},
        "not .*2, ": tensors | {DOWN: torch.tensor(1.0)},
        "one number": tensors | {UP.replace("lora_up.weight", "alpha"): torch.ones(3)},
        "no layer": tensors | {"lora_unet_mid.lora_down.weight": torch.ones(2, 2)},
    }
    for said, content in bad.items():
        safetensors_io.save(run / "bad.safetensors", content, metadata)
        with pytest.raises(ModelError, match=said):
            convert_file(run / "bad.safetensors", "diffusers", "fp32", None, out)
        with pytest.raises(ModelError, match=said):
            sampling.sample(run / "bad.safetensors", None, None, request(), tmp_path)
    layer = UP.removesuffix(".lora_up.weight")
    strange = {
        "another .* alpha": tensors | {f"{layer}.alpha": torch.tensor(1.5)},
        "another rank": tensors | {UP: tensors[UP][:, :2], DOWN: tensors[DOWN][:2]},
        "is in its recipe's targets": {
            key: tensor for key, tensor in tensors.items() if not key.startswith(f"{layer}.")
        },
        "no layer": tensors | {"lora_te_x.lora_up.weight": torch.ones(2, 2)},
        "or kind": tensors | {f"{layer}.dora_scale": torch.ones(len(tensors[UP]), 1)},
        "magnitudes": tensors | {f"{layer}.dora_scale": torch.ones(3, 1)},
    }
    for said, content in strange.items():
        safetensors_io.save(run / "bad.safetensors", content, metadata)
        with pytest.raises(ModelError, match=said):
            convert_file(run / "bad.safetensors", "diffusers", "fp32", None, out)
    os.mkfifo(run / "pipe.safetensors")
    with pytest.raises(ModelError, match="regular"):
        convert_file(run / "pipe.safetensors", "diffusers", "fp32", None, out)
    assert not out.exists()

    used = []
    load = StableDiffusion.load_pipeline

    def watched(family: StableDiffusion) -> Any:
        pipeline = load(family)
        call = type(pipeline).__call__
        spy = lambda self, *a, **k: used.append(self.scheduler.config.prediction_type) or call(self, *a, **k)  # noqa: E731
        monkeypatch.setattr(type(pipeline), "__call__", spy)
        return pipeline

    monkeypatch.setattr(StableDiffusion, "load_pipeline", watched)
    assert len(sampling.sample(file, None, None, request(), tmp_path)) == 1
    assert used == ["v_prediction"]
    for odd in ({"size_px": 33}, {"prompts": ("x --ar 3:2",)}, {"prompts": ("x " * 200,)}):
        with pytest.raises(ConfigError):
            sampling.sample(file, None, None, request(**odd), tmp_path)

    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for taken in (notes, tmp_path, Path("/dev/null")):
        with pytest.raises(ConfigError, match="in the way"):
            convert_file(file, "diffusers", "fp32", None, taken)
        with pytest.raises(ConfigError, match="in the way"):
            report([run], taken, 0.01)
    assert notes.read_text() == "mine"
    for _ in range(2):
        convert_file(file, "diffusers", "fp32", None, out)


def test_a_checkpoint_that_is_not_what_the_run_says_is_not_exported(train_toy: Callable[..., Path]) -> None:
    run = train_toy("train.max_steps=1", "lr_scheduler={type: constant}", "sample={}")

    def refused(kind: type[TrainerError]) -> str:
        with pytest.raises(kind) as caught:
            export_run(run, None, "kohya", "fp16", "exported", run / "out.safetensors")
        assert not (run / "out.safetensors").exists()
        return str(caught.value)

    config, plan = run / "config.yaml", run / "plan.json"
    before = config.read_text()
    for change in ("rank: 4", "rank: 8"), ("targets: attention", "targets: transformer"), ("dora: false", "dora: true"):
        assert change[0] in before
        config.write_text(before.replace(*change))
        assert "recipe" in refused(ModelError)
    config.write_text(before)
    for content in ("", "[]", "[" * 100_000, '{"num_images": "\udcff"}'):
        plan.write_text(content, errors="surrogateescape")
        assert "the run's plan cannot be read" in refused(SystemSetupError)
    shutil.rmtree(run / "checkpoints")
    assert str(run / f"{run.name}.safetensors") in refused(ConfigError)


def test_what_steers_a_terminal_is_shown_as_an_escape() -> None:
    assert str(Problem("a\x1b[31mb\x9bc\u202ed\te\né")) == "a\\x1b[31mb\\x9bc\\u202ed\te\né"
