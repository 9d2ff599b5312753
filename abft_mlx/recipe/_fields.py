"""What every section of a recipe is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_flag(value: Any) -> Any:
    """Refuse booleans where a number belongs: pydantic would read ``true`` as 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed here")
    return value


def _as_name(value: Any) -> Any:
    """Let people write class names such as 0 and 1 without quotes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


Int = Annotated[int, BeforeValidator(_no_flag)]
Number = Annotated[float, BeforeValidator(_no_flag), Field(allow_inf_nan=False)]
Name = Annotated[str, BeforeValidator(_as_name)]
Pair = tuple[str, str]


class Section(BaseModel):
    """Settings that cannot be changed after construction; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
