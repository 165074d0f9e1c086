"""Lengths of training in the units people think in: updates (100), epochs ("2ep") or a share of the run ("5%")."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>ep|%)")


class ScheduleError(ValueError):
    """The options cannot be laid over this run; the message says why and what to write."""


@dataclass(frozen=True, slots=True)
class Horizon:
    """What a run is measured against: N optimizer updates in all, and how many of them make an epoch."""

    num_updates: int
    updates_per_epoch: int


def check_duration(value: Any) -> Any:
    """Accept a whole number >= 0 (as 100 or 1e2), "2ep" or "5%".

    Raises:
        ValueError: it is none of these.
    """
    whole = isinstance(value, float) and value.is_integer()
    if whole or (isinstance(value, int) and not isinstance(value, bool)):
        if value < 0:
            raise ValueError("a length is not negative")
        return int(value)
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        share = isinstance(value, float) and 0 < value < 1
        meant = f'; {value:g} of the run is "{100 * value:g}%"' if share else ""
        raise ValueError(f'a length is a whole number of updates (100), epochs ("2ep") or a percentage ("5%"){meant}')
    if match["unit"] == "%" and float(match["number"]) > 100:
        raise ValueError("a percentage of the run is at most 100%")
    return value.strip()


def check_period(value: Any) -> Any:
    """Accept a duration that is not 0, or None.

    Raises:
        ValueError: it is 0.
    """
    if value is not None and check_duration(value) in (0, "0%", "0ep"):
        raise ValueError("a period is at least 1; write null for never")
    return value


Duration = Annotated[int | str, BeforeValidator(check_duration)]


def to_updates(duration: int | str, horizon: Horizon) -> int:
    """The duration in optimizer updates: rounded half up and at least 1, unless it is written as nothing (0)."""
    if isinstance(duration, int):
        return duration
    match = _DURATION.fullmatch(duration)
    assert match is not None, f"unchecked duration {duration!r}"
    number = float(match["number"])
    if number == 0:
        return 0
    whole = horizon.updates_per_epoch if match["unit"] == "ep" else horizon.num_updates / 100
    return max(1, math.floor(number * whole + 0.5))


def at_least_one(duration: int | str, horizon: Horizon, name: str) -> int:
    """The duration in updates.

    Raises:
        ScheduleError: it is none.
    """
    updates = to_updates(duration, horizon)
    if updates < 1:
        raise ScheduleError(f"`{name}` is at least one update")
    return updates
