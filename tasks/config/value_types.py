"""The types of single parameters: their ranges, and how a fraction is read."""

from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, Strict
from pydantic_core import PydanticCustomError


def _fraction(value: object) -> object:
    """Read "8/255" as 8 / 255; leave every other value to pydantic."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return value
    return value


def _depth(value: int) -> int:
    if (value - 4) % 6:
        raise PydanticCustomError("depth", "allowed are 10, 16, 22, 28, 34, ... (6 n + 4)")
    return value


Depth = Annotated[int, Field(ge=10), AfterValidator(_depth)]  # layers of a wide residual network
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
# A distance between images whose pixels are in [0, 1]: a number, or a fraction such as "8/255".
Distance = Annotated[float, Field(gt=0.0, le=1.0), BeforeValidator(_fraction)]
# The radius of an evaluation attack, which may exceed 1 in L2.
Radius = Annotated[float, Field(gt=0.0, allow_inf_nan=False), BeforeValidator(_fraction)]
Text = Annotated[str, Field(min_length=1)]
# YAML has lists; a frozen setting needs a tuple.
Strides = Annotated[tuple[Count, Count, Count, Count], Strict(False), PlainSerializer(list)]
