"""Where the groups of a sweep are trained. A group is self-contained: its folder and its plan are all it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from lora_trainer.training.group import TrialGroup

Train = Callable[[TrialGroup], None]


class Placement(Protocol):
    """Trains groups somewhere, in any order or at once, and hands each back when it is done."""

    def run(self, groups: Sequence[TrialGroup], train: Train) -> Iterator[TrialGroup]: ...


class Local:
    """One after the other, in this process (or these processes)."""

    def run(self, groups: Sequence[TrialGroup], train: Train) -> Iterator[TrialGroup]:
        for group in groups:
            train(group)
            yield group
