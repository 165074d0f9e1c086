"""Names of arms: a function of what was overridden, so that adding others renames none; safe as folder names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

LONGEST = 60
LR_KEY = "optimizer.lr"
BASE = "base"
"""The arm without overrides."""
_SAFE = re.compile(r"\w[\w.+-]*", re.ASCII)


def arm_name(overrides: Mapping[str, Any]) -> str:
    """`cosine-warmup_steps5pct-lr3e-4`: the values in the order of the overrides, the learning rate last."""
    ordered = sorted(overrides.items(), key=lambda entry: entry[0] == LR_KEY)
    text = "-".join(_entry(key, value) for key, value in ordered) or BASE
    return text if _SAFE.fullmatch(text) and len(text) <= LONGEST else _shortened(text, overrides)


def setting_name(overrides: Mapping[str, Any]) -> str:
    """The name of all that was overridden but the learning rate."""
    return arm_name({key: value for key, value in overrides.items() if key != LR_KEY})


def is_path_safe(name: str) -> bool:
    return _SAFE.fullmatch(name) is not None and len(name) <= LONGEST


def _entry(key: str, value: Any) -> str:
    if isinstance(value, Mapping) and "type" in value:
        return "-".join([str(value["type"]), *(f"{k}{_value(v)}" for k, v in value.items() if k != "type")])
    return f"{key.rpartition('.')[2]}{_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return _number(value)
    return value.replace("%", "pct") if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _number(value: float) -> str:
    """The shortest text that is this number: 3e-4, 0.05, 16."""
    exact = Decimal(repr(value)).normalize()
    return f"{exact:f}" if value == 0 or Decimal("0.01") <= abs(exact) < 10**6 else f"{exact:e}"


def _shortened(text: str, overrides: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:6]
    safe = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("_.-") or "arm"
    return f"{safe[: LONGEST - 7].rstrip('_.-')}-{digest}"
