"""What every section of a recipe shares: strictness, kinds of values, and an error that stands at one key."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Part(BaseModel):
    """One section of a recipe: unknown keys, booleans given as numbers, NaN and infinity are refused."""

    model_config = ConfigDict(**STRICT, frozen=True)


def problem(where: str | tuple[str, ...], reason: str, value: object) -> InitErrorDetails:
    """Return what is wrong with a value at a key, or a path of keys, below the part that finds it."""
    kind = PydanticCustomError("rule", "{reason}", {"reason": reason})
    return InitErrorDetails(type=kind, loc=(where,) if isinstance(where, str) else where, input=value)


def wrong(where: str | tuple[str, ...], reason: str, value: object) -> ValidationError:
    """Return one such problem as an exception."""
    return refusal([problem(where, reason, value)])


def refusal(problems: list[InitErrorDetails]) -> ValidationError:
    """Return the exception that reports the problems, each at its key."""
    return ValidationError.from_exception_data("recipe", problems)
