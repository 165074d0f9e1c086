"""Train the demo base, a tiny but real Stable Diffusion, and judge what it draws. About two hours on two cores.

    python -m demo.make.build_demo_base            # writes demo/base, resumes where it was stopped
    python -m demo.make.build_demo_base --judge    # only judges the base that is there

First the VAE, on a world wider than the captions, then UNet and text encoder together on cached latents. The figures
are printed and written into the model card, demo/base/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from demo.world.autoencoder import judge_reconstructions, shares, train_vae
from demo.world.captions import build_tokenizer
from demo.world.denoiser import DenoiserTraining, noise_scheduler
from demo.world.model_card import model_card
from demo.world.world import Scene, all_scenes, caption, is_held_out

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "demo" / "base"
NUM_JUDGED = 240
GUIDANCE, STEPS = 4.0, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo-base", help="where unfinished work is kept")
    parser.add_argument("--vae-steps", type=int, default=10_000)
    parser.add_argument("--denoiser-steps", type=int, default=12_000)
    parser.add_argument("--judge", action="store_true", help="only judge demo/base")
    options = parser.parse_args()
    if not options.judge:
        build(options.work, options.vae_steps, options.denoiser_steps)
    figures = judge(BASE)
    print(json.dumps(figures, indent=2))
    facts = json.loads((options.work / "facts.json").read_text()) if (options.work / "facts.json").is_file() else {}
    if facts:
        (BASE / "README.md").write_text(model_card(figures, facts))
        print(f"wrote {BASE / 'README.md'}")


def build(work: Path, vae_steps: int, denoiser_steps: int) -> None:
    """Train what is not there yet and save the base as a diffusers folder."""
    work.mkdir(parents=True, exist_ok=True)
    facts = {"vae_steps": vae_steps, "denoiser_steps": denoiser_steps, "machine": machine()}
    vae = timed("vae", work, lambda: finished_vae(work / "vae", vae_steps))
    reconstructions = judge_reconstructions(vae)
    print("reconstructions:", reconstructions)
    tokenizer = build_tokenizer()
    training = DenoiserTraining(vae, tokenizer, num_pictures=20_000, file=work / "denoiser.pt")
    timed("denoiser", work, lambda: training.train(denoiser_steps))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=training.average["text_encoder"],
        tokenizer=tokenizer,
        unet=training.average["unet"],
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(BASE, safe_serialization=True)
    halve(BASE)
    facts |= {
        "reconstructions": reconstructions,
        "minutes": {name: round(json.loads((work / f"{name}.time").read_text()) / 60) for name in ("vae", "denoiser")},
        "parameters": {
            name: sum(p.numel() for p in model.parameters())
            for name, model in {"vae": vae, **dict(training.average.named_children())}.items()
        },
    }
    (work / "facts.json").write_text(json.dumps(facts, indent=2))


def finished_vae(folder: Path, num_steps: int) -> AutoencoderKL:
    if (folder / "done").is_file():
        return AutoencoderKL.from_pretrained(folder)
    vae = train_vae(num_steps, num_pictures=24_000, folder=folder)
    (folder / "done").touch()
    return vae


def halve(base: Path) -> None:
    """Store UNet and VAE in fp16; the text encoder stays fp32, as transformers keeps a stored dtype."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.unet.half().save_pretrained(base / "unet", safe_serialization=True)
    pipeline.vae.half().save_pretrained(base / "vae", safe_serialization=True)
    for file in base.rglob("config.json"):  # the folder it was saved from is nobody's business
        content = json.loads(file.read_text())
        content.pop("_name_or_path", None)
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def judge(base: Path) -> dict[str, object]:
    """Draw held-out captions with the stock pipeline and let the judge read them."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    rng = np.random.default_rng(31)
    scenes: list[Scene] = [held_out[i] for i in rng.choice(len(held_out), NUM_JUDGED, replace=False)]
    images = []
    for start in range(0, NUM_JUDGED, 16):
        part = scenes[start : start + 16]
        seeds = [torch.Generator().manual_seed(1000 + start + offset) for offset in range(len(part))]
        prompts = [caption(scene) for scene in part]
        images += pipeline(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds).images
    found = {name: round(share, 4) for name, share in shares(scenes, images).items()}
    return {"num_captions": NUM_JUDGED, "guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "found": found}


def timed(name: str, work: Path, action: Callable[[], Result]) -> Result:
    """Run a stage and add its seconds to those of earlier, interrupted tries."""
    file = work / f"{name}.time"
    before = json.loads(file.read_text()) if file.is_file() else 0.0
    started = time.perf_counter()
    try:
        return action()
    finally:
        file.write_text(json.dumps(before + time.perf_counter() - started))


def machine() -> str:
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    main()
