"""Quantities of a job file: text with a unit (`8GiB`, `0.1%`, `6h`, `100MP`) on the outside, a plain number inside.

So a job file never needs a comment to say what a number is, and a bare number where a unit belongs is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Annotated, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_PIXELS = {"px": 1, "MP": 10**6, "GP": 10**9}
#: Beyond 2^53 not every whole number is one of floating point, and no machine has as much.
_MOST = 2**53
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*", re.ASCII)


def quantity(units: Mapping[str, int | Decimal], example: str, *, whole: bool = False) -> Callable[[object], object]:
    """A parser of `<number><unit>` text into a number in the base unit, rounded when only a `whole` one makes sense, as of bytes.
    Raises ValueError naming the units and an example."""

    def parse(value: object) -> object:
        match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[2] not in units:
            raise ValueError(f"a number with a unit of {', '.join(units)}, such as {example}")
        number = Decimal(match[1]) * units[match[2]]  # in binary 0.7 % would not be 0.007
        if number > _MOST:
            raise ValueError(f"a number that means something, such as {example}")
        return round(number) if whole else float(number)

    return parse


def text(units: Mapping[str, int]) -> Callable[[float], str]:
    """The inverse of `quantity`: the largest unit that divides the number."""

    def render(value: float) -> str:
        for unit, factor in sorted(units.items(), key=lambda item: -item[1]):
            if value >= factor and value % factor == 0:
                return f"{round(value / factor)}{unit}"
        return f"{Decimal(repr(value)):f}{min(units, key=lambda unit: units[unit])}"  # never 1e-07, which is no number here

    return render


def between(parse: Callable[[object], object], least: str, most: str) -> AfterValidator:
    """A validator for quantities from `least` to `most`, both given, and told, as text that `parse` takes."""
    low, high = (cast(float, parse(bound)) for bound in (least, most))

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"{least} to {most}")
        return value

    return AfterValidator(check)


def exceeds(count: int, share: float, *, of: int) -> bool:
    """Is `count` more than this share of a whole? Reckoned in the job's decimals: in binary, 29 of 100 is more than 29 %."""
    return count > Decimal(repr(share)) * of


def _typed(
    units: Mapping[str, int], parse: Callable[[object], object], example: str
) -> tuple[BeforeValidator, PlainSerializer, WithJsonSchema]:
    schema = WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)? ?(" + "|".join(units) + ")$", "examples": [example]})
    return BeforeValidator(parse), PlainSerializer(text(units)), schema


def _percent(value: float) -> str:
    return f"{(Decimal(repr(value)) * 100).normalize():f}%"


in_bytes = quantity(_BYTES, "8GiB", whole=True)
in_seconds = quantity(_SECONDS, "6h")
in_pixels = quantity(_PIXELS, "100MP", whole=True)
in_percent = quantity({"%": Decimal("0.01")}, "0.1%")

Bytes = Annotated[int, *_typed(_BYTES, in_bytes, "8GiB")]
Seconds = Annotated[float, *_typed(_SECONDS, in_seconds, "6h")]
Pixels = Annotated[int, *_typed(_PIXELS, in_pixels, "100MP")]
Fraction = Annotated[
    float,
    BeforeValidator(in_percent),
    between(in_percent, "0%", "100%"),
    PlainSerializer(_percent),
    WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)? ?%$", "examples": ["0.1%"]}),
]
# Strict: `true` is no number, and "3" is a typing error somewhere.
Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Positive = Annotated[float, Field(strict=True, gt=0)]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
