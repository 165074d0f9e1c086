"""Which layers get an adapter: named, documented lists of layer names, or the user's own patterns. Never imports torch.

The named lists belong to the model families.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

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
        chosen = {name for name, shape in shapes.items() if len(shape) == 2}
        return {name: shapes[name] for name in sorted(chosen)}
    if isinstance(targets, str):
        if targets not in presets:
            known = [*presets, ALL_LINEAR]
            near = difflib.get_close_matches(targets, known, n=1)
            fix = f"did you mean {near[0]}? " if near else ""
            what = f"`{targets}` is no named list of layers"
            raise ConfigError(
                Problem(what, "adapter.targets", fix=f"{fix}known: {', '.join(known)}; or write patterns")
            )
        patterns = presets[targets]
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
