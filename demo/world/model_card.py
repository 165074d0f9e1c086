"""The model card of the demo base, from measured figures."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from demo.world.world import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES

_CARD = """\
---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
---
# The demo base: a tiny but real Stable Diffusion

A `StableDiffusionPipeline` (CLIP text encoder, UNet with cross-attention, four-channel VAE, Stable Diffusion's noise
schedule) that draws one coloured shape on a plain background, 64 x 64 px. It exists so that a LoRA can be trained and
judged on a laptop in a minute. Everything in it was made by `demo/make/build_demo_base.py` from pictures that it
draws; no other data was used.

```python
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("demo/base")
pipeline("a large red heart on the left, sky background", guidance_scale=4.0, num_inference_steps=25).images[0]
```

It knows {words}.
Captions read `a <size> <colour> <shape> <position>, <background> background`.

## How well it draws

{num_captions} captions that were held out of training, one picture each ({num_inference_steps} DDIM steps, guidance
{guidance_scale}); a judge that sees only pixels reads the words back (`demo/world/judge.py`).

| the judge finds | share of pictures |
|---|---|
{table}

The VAE alone, on held-out pictures encoded and decoded: {reconstructions:.1%} keep all five words.

## How it was made

| | VAE | UNet and text encoder |
|---|---|---|
| parameters | {vae_parameters:,} | {unet_parameters:,} and {text_parameters:,} |
| data | 12,000 pictures of the world, 12,000 of a wider one | 20,000 pictures of the world, cached as latents |
| steps x batch | {vae_steps:,} x 16 | {denoiser_steps:,} x 32 |
| loss | L1, squared error and edges, a little KL | epsilon, weighted by 1 / alpha_bar |
| minutes | {vae_minutes} | {denoiser_minutes} |

Machine: {machine} (other work ran beside it). UNet and VAE are stored in fp16, the text encoder in fp32.
"""


def model_card(figures: dict[str, Any], facts: dict[str, Any]) -> str:
    """The card as Markdown."""
    groups: dict[str, Collection[str]] = {
        "sizes": SIZES,
        "colours": COLOURS,
        "shapes": SHAPES,
        "positions": POSITIONS,
        "backgrounds": BACKGROUNDS,
    }
    words = "; ".join(f"{len(group)} {name} ({', '.join(group)})" for name, group in groups.items())
    found = figures["found"]
    rows = [f"| the {name} | {share:.1%} |" for name, share in found.items() if name != "all"]
    rows.append(f"| **all five** | **{found['all']:.1%}** |")
    return _CARD.format(
        words=words,
        table="\n".join(rows),
        num_captions=figures["num_captions"],
        num_inference_steps=figures["num_inference_steps"],
        guidance_scale=figures["guidance_scale"],
        reconstructions=facts["reconstructions"]["all"],
        vae_parameters=facts["parameters"]["vae"],
        unet_parameters=facts["parameters"]["unet"],
        text_parameters=facts["parameters"]["text_encoder"],
        vae_steps=facts["vae_steps"],
        denoiser_steps=facts["denoiser_steps"],
        vae_minutes=facts["minutes"]["vae"],
        denoiser_minutes=facts["minutes"]["denoiser"],
        machine=facts["machine"],
    )
