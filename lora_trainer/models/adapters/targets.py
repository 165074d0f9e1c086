"""Which layers get an adapter, which adapters can share a forward. Never imports torch.

Layers are named by documented lists, which belong to the model families, or by the user's own patterns.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence

from lora_trainer.config.schema import LoraConfig
from lora_trainer.errors import ConfigError, Problem

Shape = Sequence[int]
ALL_LINEAR = "all-linear"


def select_targets(
    shapes: Mapping[str, Shape], targets: str | Sequence[str], presets: Mapping[str, Sequence[str]]
) -> dict[str, Shape]:
    """The layers that get an adapter, in the order of their names, with their weight shapes.

    A pattern matches the end of a layer's name from a dot on, and `*` stands for anything: `attn2.to_k`,
    `up_blocks.*.to_v`.

    Args:
        shapes: weight shape of every layer of the denoiser, by name.
        targets: a preset, `all-linear`, or patterns.
        presets: the family's lists of patterns.

    Raises:
        ConfigError: there is no such preset, or a pattern matches no layer.
    """
    if targets == ALL_LINEAR:
        return {name: shapes[name] for name in sorted(shapes) if len(shapes[name]) == 2}
    if isinstance(targets, str) and targets not in presets:
        known = [*presets, ALL_LINEAR]
        near = difflib.get_close_matches(targets, known, n=1)
        fix = f"{f'did you mean {near[0]}? ' if near else ''}known: {', '.join(known)}; or write patterns"
        raise ConfigError(Problem(f"`{targets}` is no named list of layers", "adapter.targets", fix=fix))
    patterns = presets[targets] if isinstance(targets, str) else targets
    matched = {pattern: {name for name in shapes if _matches(name, pattern)} for pattern in patterns}
    idle = [] if isinstance(targets, str) else [pattern for pattern, names in matched.items() if not names]
    if idle:
        fix = f"names look like: {', '.join(sorted(shapes)[:3])} ..."
        raise ConfigError(*(Problem(f"`{p}` matches no layer", "adapter.targets", fix=fix) for p in idle))
    return {name: shapes[name] for name in sorted(set().union(*matched.values()))}


def assign_param_groups(weights: Sequence[str], groups: Mapping[str, Sequence[str]], rest: str) -> dict[str, list[str]]:
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
        takers = (
            name for name, patterns in groups.items() if any(_matches(n, p) for p in patterns for n in (layer, weight))
        )
        assigned[next(takers, rest)].append(weight)
    if empty := [name for name, taken in assigned.items() if not taken]:
        fix = (
            f"its patterns match nothing, or groups before it took all; weights are named like {', '.join(weights[:2])}"
        )
        what = "no weight is left for the group"
        raise ConfigError(*(Problem(f"{what} `{name}`", "optimizer.groups", fix=fix) for name in empty))
    return assigned


def kohya_notes(config: LoraConfig, layers: Collection[str], presets: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Which programs apply the file in kohya's layout otherwise than it was trained."""
    if config.use_dora:
        yield (
            "DoRA's magnitudes act as trained in LyCORIS alone; of the kohya file ComfyUI and Forge apply them nearly, "
            "A1111 otherwise, diffusers and kohya's network not at all: docs/lora_files.md"
        )
    if blocks := presets.get("transformer+resnet"):  # all that kohya's network reaches
        beyond = [layer for layer in layers if not any(_matches(layer, pattern) for pattern in blocks)]
        if beyond:
            named = f"{', '.join(beyond[:3])}{' ...' * (len(beyond) > 3)}"
            yield f"kohya's network drops {len(beyond)} layers, which ComfyUI and diffusers apply: {named}"


def can_pack(config: LoraConfig) -> bool:
    """Whether adapters of this kind can share a pass: plain and rank-stabilised LoRA without dropout.

    DoRA rescales the base's weight itself, and dropout draws from torch's global stream, trial by trial.
    """
    return not (config.use_dora or config.dropout)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
