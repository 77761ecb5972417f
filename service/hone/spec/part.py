"""What every part of the request is made of: the base class, number types, fields that tell their default's origin."""

import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticKnownError

INT_MAX = 2**31 - 1
"""Largest whole number of a request: the wire has 32 bits for each."""


def setting(default: Any, *, origin: str, unit: str = "", **limits: Any) -> Any:
    """A field with a default, where that default comes from, and the unit of its values."""
    return Field(default, json_schema_extra={"origin": origin, "unit": unit}, **limits)


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("is true or false where a number is expected")
    return value


def _whole(value: Any) -> Any:
    """Refuses what the wire cannot carry; as a validator, because a field's own `le` would be lost beside another."""
    value = _number(value)
    text = value.strip() if isinstance(value, str) else ""
    number = int(text) if re.fullmatch(r"\d{1,99}", text) else value
    if isinstance(number, int | float) and number > INT_MAX:
        raise PydanticKnownError("less_than_equal", {"le": INT_MAX})
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _seconds(value: Any) -> Any:
    match = re.fullmatch(r"\s*(\d{1,9})\s*([smhd])\s*", value) if isinstance(value, str) else None
    return _whole(int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else value)


Int = Annotated[int, BeforeValidator(_whole)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Words = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Seconds = Annotated[int, BeforeValidator(_seconds)]
Label = Annotated[str, StringConstraints(max_length=63, pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$")]
LabelName = Annotated[str, StringConstraints(max_length=63, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
Name = Annotated[str, StringConstraints(max_length=44, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
Source = Annotated[str, StringConstraints(pattern=r"^(hf|s3|file|job)://\S+$", max_length=2048)]


class Part(BaseModel):
    """Root of every part of the request: frozen, and a field that nobody knows is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


PartType = TypeVar("PartType", bound=Part)


def exactly_one(part: PartType, names: tuple[str, ...]) -> PartType:
    given = [name for name in names if getattr(part, name) is not None]
    if len(given) != 1:
        found = "none is given" if not given else f"{' and '.join(given)} are given"
        raise ValueError(f"takes exactly one of {', '.join(names)}; {found}")
    return part
