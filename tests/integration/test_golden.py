"""Trained numbers stay what they were: a change of them is a decision, which CHANGELOG states.

Every case is trained on the stored base and images of tests/format_1, and each tensor compared with the stored one,
|a - b| <= 1e-3 |b|. Two or four threads in place of one, or a processor without AVX, move them by 1.4e-4 at most
(DoRA; the others by 3e-5): measured.
After such a decision: `python tests/integration/test_golden.py` stores the numbers anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.cli.find_lr import find_lr
from lora_trainer.cli.train import sweep, train
from lora_trainer.experiments.lr_finder.prepare import FinderOptions

pytestmark = pytest.mark.usefixtures("plain_pictures")

FORMAT_1, GOLDEN = (Path(__file__).parents[1] / name for name in ("format_1", "golden"))
CONFIG = f"""
name: golden
seed: 7
model: {{path: {FORMAT_1 / "base"}}}
data: {{dir: {FORMAT_1 / "images"}, resolution: 32}}
adapter: {{rank: 2, alpha: 1, targets: transformer+resnet}}
optimizer: {{type: adamw, lr: 1e-2}}
lr_scheduler: {{type: cosine, warmup_steps: 2}}
train: {{max_steps: 12, batch_size: 2, threads: 1}}
export: {{dtype: fp32}}
tracking: {{tensorboard: false}}
"""
TOLERANCE = 1e-3
HELD_OUT = "validation={fraction: 0.34, every_steps: 3, max_cost: 1.0}"
SOLO = {
    "solo": ("data.flip=true", "data.captions.dropout=0.3"),
    "accumulation-average": ("train.gradient_accumulation_steps=2", "train.ema_decay=0.9", "objective.min_snr_gamma=5"),
    "dora": ("adapter.use_dora=true", "lr_scheduler={type: rex}"),
}
FOUR = (
    "sweep={grid: {optimizer.lr: [1e-3, 1e-2], lr_scheduler: [{type: constant}, {type: linear}]}, trials_per_pass: 4}"
)

NAMES = (*SOLO, "sweep-of-four", "find-lr")


def trained(name: str, work: Path, *words: str) -> dict[str, torch.Tensor]:
    """The tensors that a case leaves; of several trials, each under its name."""
    config = work / "golden.yaml"
    config.write_text(CONFIG)
    words = (f"output_dir={work / 'runs'}", f"name={name}", *words)
    if name in SOLO:
        train(config, [*words, *SOLO[name]])
        return load_file(work / "runs" / name / f"{name}.safetensors")
    if name == "sweep-of-four":
        sweep(config, [*words, HELD_OUT, FOUR])
        files = sorted((work / "runs" / name / "trials").glob("*/*-seed7.safetensors"))
        assert len(files) == 4
        return {f"{file.stem}/{key}": tensor for file in files for key, tensor in load_file(file).items()}
    find_lr(config, [*words, HELD_OUT], FinderOptions(num_steps=30, verify=True))
    found = json.loads((work / "runs" / f"{name}-find-lr" / "find_lr.json").read_text())
    return {key: torch.tensor(numbers_in(found[key]), dtype=torch.float64) for key in ("points", "forks", "lr")}


def numbers_in(content: Any) -> list[float]:
    """All numbers of a JSON value, in their order."""
    if isinstance(content, dict):
        return [number for key in sorted(content) for number in numbers_in(content[key])]
    if isinstance(content, list):
        return [number for value in content for number in numbers_in(value)]
    return [float(content)] if isinstance(content, int | float) else []


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_that_were(name: str, tmp_path: Path) -> None:
    ours, stored = trained(name, tmp_path), load_file(GOLDEN / f"{name}.safetensors")
    assert ours.keys() == stored.keys()
    for key, tensor in stored.items():
        difference = torch.linalg.vector_norm(ours[key] - tensor)
        assert difference <= TOLERANCE * torch.linalg.vector_norm(tensor), key


if __name__ == "__main__":
    for name in NAMES:
        with TemporaryDirectory() as folder:
            save_file(trained(name, Path(folder)), GOLDEN / f"{name}.safetensors")
