"""Makes what lies beside it, with the program of revision 4d24846, the last that wrote checkpoints of format 1.

    git worktree add /tmp/old 4d24846
    cd /tmp/old && PYTHONPATH=. python .../tests/format_1/make.py EMPTY_FOLDER

`stopped/` has run directories that were told to stop in the middle, and one that ended; `expected/` has the LoRA files
that the same program made of them. `skipped` had an update skipped, after which its two counters differ; its expected
file is what it trains where they are made equal again. All numbers are those of `settings.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from lora_trainer.atomicio import to_json
from lora_trainer.commands import sweep as sweep_command
from lora_trainer.commands import train as train_command
from lora_trainer.update import Updater
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from lora_trainer.errors import StoppedBySignal

sys.path.insert(0, "tests")
from toys import MAX_TOKENS, TEXT_WIDTH, tiny_unet, toy_tokenizer

HERE = Path(__file__).parent
DROPPED = ("*.yaml", "*.png", "*.html", "environment.json", "exit.json", ".*", "samples", "*-best.safetensors")


def build_base(folder: Path) -> None:
    """A Stable Diffusion of few, half-precision weights."""
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=32,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def draw_images(folder: Path) -> None:
    folder.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"picture {index}\n")


@contextmanager
def stopping_after(polls: int | None) -> Iterator[None]:
    """Let runs inside the block be told to stop at their update number `polls`; None lets them end."""

    class Stop(train_command.StopRequest):
        asked_so_far = 0

        def __call__(self) -> bool:
            self.asked_so_far += 1
            return polls is not None and self.asked_so_far >= polls

    before = train_command.StopRequest, sweep_command.StopRequest
    train_command.StopRequest = sweep_command.StopRequest = Stop
    with suppress(StoppedBySignal):
        yield
    train_command.StopRequest, sweep_command.StopRequest = before


@contextmanager
def a_gradient_spoilt_in(attempt: int) -> Iterator[None]:
    honest: Callable[..., Any] = Updater.run
    hooks: list[Any] = []

    def run(self: Updater, tried: int, step: int, **named: Any) -> Any:
        while hooks:
            hooks.pop().remove()
        if tried == attempt:
            parameter = next(iter(self._trials[0].parameters.values()))
            hooks.append(parameter.register_hook(lambda gradient: gradient * float("nan")))
        return honest(self, tried, step, **named)

    Updater.run = run
    try:
        yield
    finally:
        Updater.run = honest


def make_counters_equal(checkpoint: Path) -> None:
    """Let a checkpoint say that as many updates were tried as completed: what a resume of it trains is expected."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["progress"]["attempt"] = state["progress"]["step"]
    content = to_json(state)
    (checkpoint / "state.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["sha256"] = hashlib.sha256(to_json(manifest["files"])).hexdigest()
    (checkpoint / "manifest.json").write_bytes(to_json(manifest))


def keep(run_dir: Path, target: Path) -> None:
    """What a resume reads of a run directory."""
    shutil.copytree(run_dir, target, ignore=shutil.ignore_patterns(*DROPPED))
    for empty in sorted(target.rglob("*"), reverse=True):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()


def keep_loras(folder: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in sorted(folder.rglob("*.safetensors")):
        if file.stem == file.parent.name:
            shutil.copy(file, target / file.name)


def main(work: Path) -> None:
    for folder in ("base", "images", "stopped", "expected"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    build_base(HERE / "base")
    draw_images(HERE / "images")
    settings = json.loads((HERE / "settings.json").read_text())

    def train(name: str) -> Path:
        file, output = work / f"{name}.yaml", work / "runs"
        places = {"output_dir": str(output), "model": {"path": str(HERE / "base")}}
        config = {"name": name, **settings["all"], **settings[name], **places}
        config["data"] = {"dir": str(HERE / "images"), **config["data"]}
        file.write_text(json.dumps(config))
        train_command.train(file, [])
        return output / name

    for name in ("watched", "skipped", "swept"):
        run_dir = work / "runs" / name
        with stopping_after(4 if name == "skipped" else 3), a_gradient_spoilt_in(1 if name == "skipped" else -1):
            train(name)
        keep(run_dir, HERE / "stopped" / name)
        if name == "skipped":
            make_counters_equal(run_dir / "checkpoints" / "step-00000003")
        train(name)
        keep_loras(run_dir, HERE / "expected" / name)
        if name == "watched":
            keep(run_dir, HERE / "stopped" / "finished")
            shutil.rmtree(HERE / "stopped" / "finished" / "checkpoints" / "step-00000003")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
