"""Write docs/schedules.md and its pictures: every schedule as `lora-trainer schedules` shows it.

The text is one of the pages of docs/make_docs.py, so that a test keeps it current; the pictures are drawn by this
script alone, as their bytes depend on the version of matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from lora_trainer.cli.schedules import Preview, example_horizon, fact_rows, named_previews
from lora_trainer.config.structure import option_rows
from lora_trainer.report.pictures import Curve, draw_schedules
from lora_trainer.schedules.registry import CLASSIC, SCHEDULES, TorchSchedule
from lora_trainer.schedules.schedule import DecayOptions, ScheduleOptions
from lora_trainer.strict_model import StrictModel

DOCS = Path(__file__).resolve().parent
PICTURES = DOCS / "schedules"
STEPS, EPOCH_STEPS, LR = 1000, 100, 1e-4
COMPARED = [name for name, kind in SCHEDULES.items() if kind is not TorchSchedule]
_SHARED = ("type", "cooldown_steps", "warmup_steps", "warmup_shape", "warmup_start", "end")
_HEAD = f"""\
# Learning-rate schedules

Every schedule that `lr_scheduler.type` can name, laid over a run of {STEPS:,} updates with a base learning rate of
{LR:g} and {EPOCH_STEPS} updates an epoch. Pictures and numbers are those of this command, which shows them for any run:

```bash
lora-trainer schedules plot NAME [key=value ...] --steps 1500 --lr 2e-4 -o picture.png
lora-trainer schedules plot --config configs/demo.yaml -o picture.png
lora-trainer schedules show NAME    # its options in words
```

**Notation.** N is the number of optimizer updates of the run, k = 0 ... N-1 the update, W the updates of the warm-up.
Update k uses the learning rate `base x m(k)`; nothing else moves it: not the number of processes, not gradient
accumulation, not a resume, not a skipped update. p = (k - W) / (N - W) is the share of the fall that is done, and with
a floor f = `min_ratio` the curve m becomes f + (1 - f) m. The **LR budget** is the mean of m: how much of constant
training at the base learning rate the run amounts to.

**Lengths** are optimizer updates (`100`), epochs (`"2ep"`) or a share of the run (`"5%"`).

## The six of the Stable Diffusion trainers

![the six](schedules/six.png)

## All of them

![all schedules](schedules/all.png)

"""
_SHARED_HEAD = """\
## Options of most schedules

A warm-up (the `warmup_` options) comes before the schedule's own curve; all but {without_warmup} take
one. A cool-down falls to zero on top of the curve; all take one. `end` belongs to those that fall over the whole run:
{with_end}.

The plan of a run warns where a schedule is allowed but probably not meant: a warm-up of one update or of more than half
the run, an LR that rises when training ends, more than a tenth of the updates under a thousandth of the base LR,
`cosine_with_restarts` with one cycle, phases that do not sum to the run. A warm-up as long as the run is refused, and
so is an option that the chosen schedule would ignore.

"""


def page() -> str:
    """The whole page in Markdown."""
    shared = _SHARED_HEAD.format(
        without_warmup=_names(lambda kind: "warmup_steps" not in kind.model_fields),
        with_end=_names(lambda kind: "end" in kind.model_fields),
    )
    parts = [_HEAD, shared, _table(DecayOptions, only=_SHARED[1:])]
    for name, kind in SCHEDULES.items():
        parts.append("".join(_section(name, kind)))
    return "\n".join(parts)


def _names(such: Callable[[type[ScheduleOptions]], bool]) -> str:
    """The schedules of which this holds, in words."""
    *others, last = [f"`{name}`" for name, kind in SCHEDULES.items() if such(kind)]
    return f"{', '.join(others)} and {last}"


def _section(name: str, kind: type[ScheduleOptions]) -> Iterator[str]:
    (shown,) = named_previews([name], example_horizon(STEPS, EPOCH_STEPS), LR)
    told = dict(fact_rows(shown))
    yield f"## {name}\n\n{_sentence(kind.summary)} {_sentence(kind.limits)}\n\n"
    yield f"`{' '.join((kind.__doc__ or '').split())}`\n\n"
    yield _table(kind, leave_out=_SHARED)
    written = {key: value for key, value in kind.example.items() if key != "type"}
    yield f"\nShown: `lr_scheduler: {json.dumps({'type': name, **written})}`. LR budget **{shown.facts.budget:.2f}**; "
    yield f"{told['learning rate']}; half-life: {told['half-life']}.\n\n"
    yield f"![{name}](schedules/{name}.png)\n"


def _table(model: type[StrictModel], only: tuple[str, ...] = (), leave_out: tuple[str, ...] = ()) -> str:
    rows = [
        f"| `{key}` | {values} | {default} | {text} |"
        for key, values, default, text in option_rows(model)
        if (key not in leave_out or default == "**required**") and (key in only or not only)
    ]
    if not rows:
        return "No options of its own.\n"
    return "\n".join(["| option | value | default | |", "|---|---|---|---|", *rows]) + "\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def draw() -> None:
    """The pictures of the page, by the same function as `lora-trainer schedules plot`."""
    PICTURES.mkdir(exist_ok=True)
    horizon = example_horizon(STEPS, EPOCH_STEPS)
    for name in SCHEDULES:
        curves = [_curve(shown) for shown in named_previews([name], horizon, LR)]
        draw_schedules(curves, PICTURES / f"{name}.png", title=name, steps_per_epoch=EPOCH_STEPS, scale=0.55)
    for file, names in {"six.png": CLASSIC, "all.png": COMPARED}.items():
        curves = [_curve(shown) for shown in named_previews(names, horizon, LR)]
        draw_schedules(curves, PICTURES / file, title=f"Learning rate over {STEPS} updates", scale=0.7)

    for picture in PICTURES.glob("*.png"):
        with Image.open(picture) as whole:
            small = whole.convert("RGB").quantize(64)
        small.save(picture, optimize=True)


def _curve(shown: Preview) -> Curve:
    return Curve(shown.label, shown.facts.lrs, shown.schedule.marks)


if __name__ == "__main__":
    draw()
    (DOCS / "schedules.md").write_text(page())
