"""Which layers get an adapter: named, documented lists of layer names, or the user's own patterns. Never imports torch.

The names are those of diffusers' UNet. `transformer` is kohya's default (`LoRA` in sd-scripts), `transformer+resnet`
its convolution extension (`LoCon`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from lora_trainer.errors import ConfigError, Problem

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEEDFORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.*.conv", "upsamplers.*.conv")

TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "attention+feedforward": (*ATTENTION, *FEEDFORWARD),
    "transformer": (*ATTENTION, *FEEDFORWARD, *PROJECTIONS),
    "transformer+resnet": (*ATTENTION, *FEEDFORWARD, *PROJECTIONS, *RESNET),
}

Shape = Sequence[int]


def select_targets(shapes: Mapping[str, Shape], targets: str | Sequence[str]) -> dict[str, Shape]:
    """The layers that get an adapter, in the order of their names, with their weight shapes.

    A pattern matches the end of a layer's name from a dot on, and `*` stands for anything: `attn2.to_k`,
    `up_blocks.*.to_v`.

    Args:
        shapes: weight shape of every layer of the denoiser, by name.
        targets: a key of `TARGETS`, `all-linear`, or patterns.

    Raises:
        ConfigError: a pattern matches no layer.
    """
    if targets == "all-linear":
        chosen = {name for name, shape in shapes.items() if len(shape) == 2}
        return {name: shapes[name] for name in sorted(chosen)}
    if isinstance(targets, str):
        patterns: Sequence[str] = TARGETS[targets]
        return {name: shapes[name] for name in sorted(shapes) if any(_matches(name, p) for p in patterns)}
    problems = [
        Problem(
            f"`{pattern}` matches no layer",
            "adapter.targets",
            fix=f"names look like: {', '.join(sorted(shapes)[:3])} ...",
        )
        for pattern in targets
        if not any(_matches(name, pattern) for name in shapes)
    ]
    if problems:
        raise ConfigError(*problems)
    return {name: shapes[name] for name in sorted(shapes) if any(_matches(name, p) for p in targets)}


def assign_groups(weights: Sequence[str], groups: Mapping[str, Sequence[str]], rest: str) -> dict[str, list[str]]:
    """The weights of each group, those of no group under `rest`; the first group whose pattern matches has a weight.

    Args:
        weights: names such as `<layer>.lora_A.weight`.
        groups: patterns by the group's name, for the end of a layer's or a weight's name.

    Raises:
        ConfigError: a group gets no weight, or none is left for the rest.
    """
    assigned: dict[str, list[str]] = {rest: [], **{name: [] for name in groups}}
    for weight in weights:
        layer = weight.rpartition(".lora_")[0]
        owner = (
            name for name, patterns in groups.items() if any(_matches(n, p) for p in patterns for n in (layer, weight))
        )
        assigned[next(owner, rest)].append(weight)
    empty = [name for name, own in assigned.items() if not own]
    if empty:
        raise ConfigError(
            *(
                Problem(
                    f"no weight is left for the group `{name}`",
                    "optimizer.groups",
                    fix="its patterns match nothing, or groups before it took all; weights are named like "
                    + ", ".join(weights[:2]),
                )
                for name in empty
            )
        )
    return assigned


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
