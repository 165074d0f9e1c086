"""What a checkpoint costs at SDXL's size: hash, write, fsync and read-back of a rank-32 adapter with AdamW's state.

Measured here: the save itself, on this disk, with random tensors of the real shapes, in CPU seconds and in seconds of
waiting for fsync; their sum is what it takes on a core of its own, whatever else ran meanwhile. Not measured here: the
step time of SDXL, for which published figures stand; the shares are computed from both.

    python benchmarks/checkpoint_cost.py --folder /path/on/the/disk --output benchmarks/results/checkpoint_cost.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.progress import track

from lora_trainer.config.schema import CheckpointConfig
from lora_trainer.models.adapters.targets import select_targets
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.runtime.device import processor_name
from lora_trainer.storage import atomic_files
from lora_trainer.storage.checkpoint import prune, save_checkpoint
from lora_trainer.storage.safetensors_io import Tensors

RANK = 32
STEP_SECONDS = {
    "RTX 3090/4090, batch 1 (kohya sd-scripts#827, published)": 1.2,
    "H100, batch 1 (SimpleTuner, published)": 0.606,
    "H200, batch 1, fused (modelled, no program reaches it)": 0.035,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def sdxl_state(targets: str) -> dict[str, Tensors]:
    """Adapter and both moments of AdamW, fp32, random, by SDXL's layer names."""
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**SDXL)
    shapes = {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in denoiser.named_parameters()
        if name.endswith(".weight") and parameter.dim() > 1
    }
    adapter: Tensors = {}
    for name, (out, *rest) in select_targets(shapes, targets, StableDiffusion.target_presets).items():
        adapter[f"run/{name}.lora_A.weight"] = torch.randn(RANK, *rest)
        adapter[f"run/{name}.lora_B.weight"] = torch.randn(out, RANK)
    moments = {
        f"{name}/{kind}": torch.rand_like(t) for name, t in adapter.items() for kind in ("exp_avg", "exp_avg_sq")
    }
    return {"adapter": adapter, "optimizer": moments}


def timed_save(folder: Path, number: int, parts: dict[str, Tensors]) -> dict[str, float]:
    """Seconds of one save: CPU before its last sync and after it (the read-back), and waiting for fsync."""
    clock = {"fsync": 0.0, "sync": 0.0, "named": 0.0}

    def observe(moment: str, operation: str, _: Path) -> None:
        if operation in ("sync", "sync_folder"):
            if moment == "before":
                clock["sync"] = time.perf_counter()
            else:
                clock["fsync"] += time.perf_counter() - clock["sync"]
                clock["named"] = time.process_time()

    started, started_cpu = time.perf_counter(), time.process_time()
    with atomic_files.observe_operations(observe):
        save_checkpoint(folder, number, parts, {})
    ended_cpu = time.process_time()
    wall, cpu, read_back = time.perf_counter() - started, ended_cpu - started_cpu, ended_cpu - clock["named"]
    prune(folder, CheckpointConfig().keep_last)
    return {
        "on a core of its own": cpu + clock["fsync"],
        "encode, hash and write (CPU)": cpu - read_back,
        "fsync (waiting)": clock["fsync"],
        "read back and hash (CPU)": read_back,
        "wall, with whatever else ran": wall,
    }


def hash_speed() -> float:
    """sha256 in GiB/s, one core."""
    block = bytes(2**28)
    started = time.process_time()
    hashlib.sha256(block).hexdigest()
    return len(block) / (time.process_time() - started) / 2**30


def measure(folder: Path, targets: str, repeats: int) -> dict[str, Any]:
    """Median seconds of the parts of a save, and their share of training time."""
    parts = sdxl_state(targets)
    size = sum(t.numel() * t.element_size() for tensors in parts.values() for t in tensors.values())
    saves = [timed_save(folder, number, parts) for number in track(range(repeats + 1), f"saving, {targets}")][1:]
    seconds = {name: round(statistics.median(save[name] for save in saves), 3) for name in saves[0]}
    period = CheckpointConfig().every_steps
    assert isinstance(period, int)
    own = seconds["on a core of its own"]
    return {
        "targets": targets,
        "trainable parameters": sum(t.numel() for t in parts["adapter"].values()),
        "checkpoint MiB": round(size / 2**20, 1),
        "median seconds": seconds,
        f"share of training time, a save every {period} updates": {
            name: f"{own / (own + period * step):.2%}" for name, step in STEP_SECONDS.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: the temporary one")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--note", default="", help="what else to know of machine and disk; stands in the results")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    said = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-cost-", dir=said.folder))
    try:
        results = {
            "what": "SDXL-shaped state, rank 32, AdamW, fp32; step times are published ones, not measured here",
            "command": "python benchmarks/checkpoint_cost.py",
            "processor": processor_name(),
            "note": said.note,
            "threads": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sha256 GiB/s": round(hash_speed(), 2),
            "sizes": [measure(folder, targets, said.repeats) for targets in ("attention", "transformer")],
        }
    finally:
        shutil.rmtree(folder)
    text = json.dumps(results, indent=2)
    print(text)
    if said.output is not None:
        said.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
