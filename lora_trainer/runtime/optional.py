"""Packages that only some features need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from lora_trainer.errors import HostError, Problem


def load(target: str, *, feature: str, extra: str | None = None) -> Any:
    """The object at `package.module:name`.

    Args:
        feature: what needs it, for the message.
        extra: the extra of lora_trainer that installs the package, where one does.

    Raises:
        HostError: it cannot be imported; the message says what to install.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise HostError(
            Problem(
                f"{feature} needs `{target}`, which cannot be imported",
                why=str(error),
                fix=f"pip install 'lora_trainer[{extra}]'"
                if extra
                else f"install or mend the package `{module.split('.')[0]}`",
            )
        ) from error
