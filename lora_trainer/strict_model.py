"""The base of every configuration section: strict, frozen, documented by the text below each field."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class StrictModel(BaseModel):
    """Unknown keys are refused, values never change after load, infinities and NaN are no numbers."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected here, not true or false")
    return value


def matching(pattern: str, words: str) -> AfterValidator:
    """Text of a form, which a refusal says in words."""

    def check(value: str) -> str:
        if re.fullmatch(pattern, value) is None:
            raise ValueError(words)
        return value

    return AfterValidator(check)


def gathering(rest: str, *fixed: str) -> BeforeValidator:
    """`{<fixed key>: ..., <any other>: ...}` as written, with the others in a section `rest` of their own."""

    def gather(value: Any) -> Any:
        if not isinstance(value, dict) or rest in value:
            return value
        kept = {key: value[key] for key in fixed if key in value}
        return {**kept, rest: {key: entry for key, entry in value.items() if key not in kept}}

    return BeforeValidator(gather)


NotBool = BeforeValidator(_no_bool)
Count = Annotated[int, Field(ge=1, le=1_000_000), NotBool]
"""Bounded, as what is counted out is also listed: no typing error costs minutes or all memory."""
Number = Annotated[float, NotBool]
Positive = Annotated[float, Field(gt=0), NotBool]
NotNegative = Annotated[float, Field(ge=0), NotBool]
Ratio = Annotated[float, Field(ge=0, le=1), NotBool]
