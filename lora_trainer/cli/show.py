"""`lora-trainer check --show N`: crops and captions in a folder, exactly as the encoders get them. Never torch."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from lora_trainer.data.entries import Framed, training_views
from lora_trainer.errors import ConfigError, Problem
from lora_trainer.models.family import Family
from lora_trainer.models.registry import open_family
from lora_trainer.planning.prepare import Prepared
from lora_trainer.storage import atomic_files

INDEX, GENERATOR = "index.html", "lora_trainer check"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{generator}"><title>{title}</title>
<style>body {{ font: 15px sans-serif; margin: 2em }} img {{ width: 256px }} del {{ color: #b00 }}
figure {{ display: inline-block; vertical-align: top; width: 260px }} pre {{ white-space: pre-wrap }}</style></head>
<body><h1>{title}</h1>
{figures}</body></html>
"""


def show_views(prepared: Prepared, num: int) -> Path:
    """Write `num` of the views that are trained on, evenly chosen, with their captions; the page that shows them.

    Raises:
        ConfigError: something that we did not write is in the way.
    """
    folder = prepared.run_dir.with_name(f"{prepared.config.name}-check")
    records = prepared.dataset.records
    _clear(folder, [record.path for record in records])
    views = list(training_views(prepared.config, records).values())
    chosen = [views[index * len(views) // num] for index in range(num)] if num < len(views) else views
    files, family = {f"{number:04}.png": image for number, image in enumerate(chosen, 1)}, open_family(prepared.base)
    title = f"{len(chosen)} of {len(views)} views of {len(records)} images of {prepared.config.name}"
    figures = "".join(part for name, image in files.items() for part in _figure(name, image, family))
    page = _PAGE.format(generator=GENERATOR, title=escape(title), figures=figures)
    atomic_files.write_file(folder / INDEX, page.encode(errors="replace"))  # first: by it the folder is known as ours
    for name, image in files.items():
        png = io.BytesIO()
        Image.fromarray(image.pixels()).save(png, "PNG")
        atomic_files.write_file(folder / name, png.getvalue())
        read = "".join(f"{family.readable(caption)}\n" for caption in image.record.captions)
        atomic_files.write_file((folder / name).with_suffix(".txt"), read.encode(errors="replace"))
    return folder / INDEX


def _figure(file: str, image: Framed, family: Family) -> Iterator[str]:
    view, record = image.view, image.record
    (width, height), side = view.scaled_size, view.resolution
    part = f"scaled to {width} x {height}, cut out at {view.left}, {view.top}" + ", mirrored" * image.mirrored
    repeats = f"; {record.repeats} times an epoch" if record.repeats > 1 else ""
    yield f'<figure><img src="{file}" width="{side}" alt="">'
    yield f"<figcaption><b>{escape(record.name)}</b><br>{part}{repeats}"
    for caption in record.captions:
        read = family.readable(caption)
        lost = f"<del>{escape(caption[len(read) :])}</del>" if len(read) < len(caption) else ""
        yield f"<pre>{escape(read)}{lost}</pre>"
    yield "</figcaption></figure>\n"


def _clear(folder: Path, images: Sequence[Path]) -> None:
    """Take out what an earlier check showed, and nothing else."""
    index = folder / INDEX
    ours = index.is_file() and GENERATOR.encode() in index.read_bytes()
    among = any(image.resolve().is_relative_to(folder.resolve()) for image in images)
    if among or (folder.exists() and not ours and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ConfigError(Problem("something that is not ours is in the way", str(folder), fix="give another `name`"))
    for file in folder.iterdir() if ours else ():
        if re.fullmatch(r"\d{4,}\.(png|txt)", file.name):
            file.unlink()
