"""Which trials make the same updates up to a step, so that those are computed once. Never imports torch.

Two trials of a group that differ in their learning rates alone are the same until the first update whose rates differ:
a shared warm-up, or several cooldowns from one plateau. From there on each goes its own way with a copy of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_trainer.config.identity import identity_fields
from lora_trainer.config.schema import RunConfig
from lora_trainer.planning.prepare import Prepared
from lora_trainer.training.group import SharedPrefix


@dataclass(frozen=True, slots=True)
class _Curve:
    """All that decides a trial's updates: what is not about learning rates, and the rates of each update."""

    rest: str
    lrs: tuple[tuple[float, ...], ...]


def find_prefixes(members: Sequence[Prepared]) -> list[SharedPrefix | None]:
    """For each trial the earlier one with which it shares most updates; None where it shares none."""
    curves = [_curve(member) for member in members]
    prefixes: list[SharedPrefix | None] = []
    for index, own in enumerate(curves):
        shared = [(0 if own is None or other is None else _agreement(own, other)) for other in curves[:index]]
        longest = max(shared, default=0)
        parent = members[shared.index(longest)].config.name if longest else ""
        prefixes.append(SharedPrefix(parent, longest) if longest else None)
    return prefixes


def _curve(member: Prepared) -> _Curve | None:
    """None where the rates are not known beforehand."""
    groups = member.lr_groups()
    if any(group.schedule.feedback is not None for group in groups):
        return None
    lrs = tuple(tuple(group.lr(k) for group in groups) for k in range(member.plan.num_updates))
    return _Curve(_without_rates(member.config), lrs)


def _without_rates(config: RunConfig) -> str:
    identity = identity_fields(config)
    groups = [(group.name, group.match) for group in config.optimizer.groups]
    rates = ("optimizer.lr", "optimizer.groups", "lr_scheduler")
    kept = {key: value for key, value in identity.items() if key not in rates and not key.startswith("lr_scheduler.")}
    return repr((kept, groups))


def _agreement(one: _Curve, other: _Curve) -> int:
    """Updates until the first whose rates differ."""
    if one.rest != other.rest:
        return 0
    pairs = zip(one.lrs, other.lrs, strict=True)
    return next((k for k, (own, others) in enumerate(pairs) if own != others), len(one.lrs))
