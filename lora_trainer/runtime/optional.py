"""Packages that only some features need, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from lora_trainer.errors import HostError, Problem


def require(module: str, *, extra: str, feature: str) -> ModuleType:
    """Import `module`, or say which extra of lora_trainer installs it.

    Raises:
        HostError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HostError(
            Problem(
                f"{feature} needs the package `{module.split('.')[0]}`, which is not installed",
                why=str(error),
                fix=f"pip install 'lora_trainer[{extra}]'",
            )
        ) from error
