"""Records and logs of ours as a reader finds them, whatever happened to them since: bounded, and of the shape meant."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lora_trainer.storage.atomic_files import open_regular, read_json
from lora_trainer.strict_model import Count

MAX_LINE, MAX_LOG = 2**24, 2**31
Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Text = Annotated[str, Field(max_length=10_000, strict=True)]
Update = Annotated[int, Field(ge=0, le=1_000_000, strict=True)]
"""A number of updates."""


def shape(needed: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Any:
    """The type of a JSON object that has at least the fields needed, and `more` with their types where it has them."""
    fields = {**needed, **{name: NotRequired[kind] for name, kind in (more or {}).items()}}
    return TypedDict("Shape", fields)  # type: ignore[operator]


PLAN = shape(
    {
        "identity": shape({"seed": int, "optimizer.lr": Finite}),
        "num_updates": Count,
        "global_batch": Count,
        "lr_groups": Annotated[list[shape({"name": Text, "lr_budget": Finite})], Field(min_length=1)],  # type: ignore[misc]
    }
)
"""What a report looks at in `plan.json`."""
ENVIRONMENT = shape({}, {"packages": dict[Text, Any]})
EXIT = shape({}, {"status": Text, "message": Text})
"""How a run ended, in `exit.json`."""
TRIAL = {
    **dict.fromkeys(("name", "arm", "setting", "status"), Text),
    "folder": Annotated[Text, Field(pattern=r"^trials/[^/\x00]+$")],
    "step": Update,
}
"""What every reader looks at in a trial's row of `sweep.json`."""
SWEEP = shape({"trials": list[shape(TRIAL)]})  # type: ignore[misc]


def read_record(file: Path, wanted: Any) -> Any:
    """The content of a JSON file of a shape.

    Raises:
        OSError, ValueError: it cannot be read, or is something else.
    """
    content = read_json(file)
    if (fault := shape_fault(content, wanted)) is not None:
        raise ValueError(fault)
    return content


def reason(error: OSError | ValueError) -> str:
    """Why a file cannot be used, in a sentence."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def shape_fault(content: Any, wanted: Any) -> str | None:
    """What first differs from a shape; None where nothing does."""
    try:
        _adapter(wanted).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}" if first["loc"] else first["msg"]
    return None


@cache
def _adapter(wanted: Any) -> TypeAdapter[Any]:
    return TypeAdapter(wanted)


def read_log(file: Path, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """The lines of a log from a byte on, each with the place of the next; of one that is too long its beginning.

    A last line that a kill cut short is left out.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than any log.
    """
    with open_regular(file) as opened:
        if opened.seek(0, os.SEEK_END) > MAX_LOG:
            raise OSError(errno.EFBIG, f"it is larger than {MAX_LOG:,} bytes")
        opened.seek(start)
        while line := opened.readline(MAX_LINE):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = opened.readline(MAX_LINE)
            if rest:
                yield line, opened.tell()
