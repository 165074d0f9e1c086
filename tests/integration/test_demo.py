"""The shipped base draws what captions say, and the demo's configuration teaches it the flower. Judged from pixels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from lora_trainer.cli.train import train
from lora_trainer.tracking.metrics import step_rows

ROOT = Path(__file__).parents[2]
BASE = ROOT / "demo" / "base"


@pytest.fixture
def demo_run(tmp_path: Path) -> Path:
    """The run of configs/demo.yaml, without the samples on the way."""
    before = Path.cwd()
    os.chdir(ROOT)  # the config names the base and the images relative to the clone
    try:
        train(Path("configs/demo.yaml"), [f"output_dir={tmp_path}", "sample.every_steps=null"])
    finally:
        os.chdir(before)
    return tmp_path / "demo"


def test_the_demo_lora_teaches_the_flower_and_keeps_the_rest(demo_run: Path) -> None:
    """As `demo/make/judge_demo.py` does it, on fewer pictures and with a margin for that; the training loss falls."""
    from demo.make.judge_demo import judge

    losses = [row["loss"] for row in step_rows(demo_run / "metrics.jsonl")]
    assert sum(losses[-50:]) < 0.7 * sum(losses[:50])
    verdict, _ = judge(demo_run / "demo.safetensors", num_flowers=16, num_others=16)
    assert verdict.flowers_before <= 0.1
    assert verdict.flowers_after >= 0.7
    assert verdict.others_before >= 0.8
    assert verdict.others_kept >= 0.65


def test_the_judge_takes_the_lora_of_the_runs_end(tmp_path: Path) -> None:
    from demo.make.judge_demo import lora_of

    for name in ("held.safetensors", "held-best.safetensors", "held-step00000100.safetensors"):
        (tmp_path / "held").mkdir(exist_ok=True)
        (tmp_path / "held" / name).touch()
    assert lora_of(tmp_path / "held").name == "held.safetensors"


def test_the_base_is_small_safe_and_complete() -> None:
    files = [file for file in BASE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    weights = {file.relative_to(BASE).as_posix() for file in files if file.suffix in (".safetensors", ".bin", ".pt")}
    assert weights == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    text = "".join(file.read_text() for file in files if file.suffix in (".json", ".md", ".txt"))
    assert "/tmp" not in text
    assert "/home" not in text


def test_the_model_card_states_at_least_85_percent() -> None:
    card = (BASE / "README.md").read_text()
    (row,) = (line for line in card.splitlines() if "all five" in line and line.startswith("|"))
    assert float(row.split("**")[3].rstrip("%")) >= 85
    num_captions = int(card.split(" captions that were held out")[0].split()[-1])
    assert num_captions >= 200


def test_stock_diffusers_loads_and_draws_with_no_dtype_given() -> None:
    disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    assert {str(model.dtype) for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {"torch.float32"}
    (image,) = pipeline("a large red heart on the left, sky background", num_inference_steps=2).images
    assert image.size == (64, 64)
    scheduler = json.loads((BASE / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
