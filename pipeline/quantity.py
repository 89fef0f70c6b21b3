"""Quantities of a job file: text with a unit (`8GiB`, `0.1%`, `6h`, `100MP`) on the outside, a plain number inside.

So a job file never needs a comment to say what a number is, and a bare number where a unit belongs is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_PIXELS = {"px": 1, "MP": 10**6, "GP": 10**9}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*")


def quantity(units: dict[str, float], example: str) -> Callable[[object], object]:
    """A parser of `<number><unit>` text into a number in the base unit. Raises ValueError naming the units and an example."""

    def parse(value: object) -> object:
        match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[2] not in units:
            raise ValueError(f"a number with a unit of {', '.join(units)}, such as {example}")
        return float(match[1]) * units[match[2]]

    return parse


def text(units: dict[str, float]) -> Callable[[float], str]:
    """The inverse of `quantity`: the largest unit that divides the number."""

    def render(value: float) -> str:
        for unit, factor in sorted(units.items(), key=lambda item: -item[1]):
            if value >= factor and (value / factor) % 1 == 0:
                return f"{round(value / factor)}{unit}"
        return f"{value}{min(units, key=lambda unit: units[unit])}"

    return render


def _typed(units: dict[str, float], example: str) -> tuple[BeforeValidator, PlainSerializer, WithJsonSchema]:
    schema = WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)? ?(" + "|".join(units) + ")$", "examples": [example]})
    return BeforeValidator(quantity(units, example)), PlainSerializer(text(units)), schema


def _percent(value: float) -> str:
    return f"{value * 100:.10g}%"


Bytes = Annotated[int, *_typed(_BYTES, "8GiB")]
Seconds = Annotated[float, *_typed(_SECONDS, "6h")]
Pixels = Annotated[int, *_typed(_PIXELS, "100MP")]
Fraction = Annotated[
    float,
    BeforeValidator(quantity({"%": 0.01}, "0.1%")),
    PlainSerializer(_percent),
    WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)? ?%$", "examples": ["0.1%"]}),
]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=False)
