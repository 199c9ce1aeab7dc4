"""How image files become pictures: the part of a run's preprocessing that is settled before a crop is resized.

It is found once for a collection, stored with the run and with the exported encoder, and used wherever that encoder's images
are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

RANGES = ("auto", "type", "image")
TRANSFORMS = ("none", "log", "sqrt", "asinh")
Ranges = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Reading:
    """How files become pictures. The defaults are what version 0.1 did.

    Args:
        range: (low, high) of each channel, between which values become shares in [0, 1], in float32. image: values deeper
            than 8 bits are stretched by each image's own smallest and largest value, to 8 bits. type: 8-bit values stay as
            they are, deeper ones are scaled by the whole range of their type, to 8 bits. auto is to be settled by
            `simmim.data.measure_images`.
        transform: of shares, for values that span decades: log, sqrt, asinh, or none.
    """

    range: Any = "image"
    transform: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "range", check_range(self.range))
        if self.transform not in TRANSFORMS:
            raise ValueError(f"unknown data.transform {self.transform!r}: give one of {', '.join(TRANSFORMS)}")
        if self.transform != "none" and self.range == "image":
            raise ValueError("data.transform needs one range for all images: give data.range auto, type, or numbers")

    @property
    def is_deep(self) -> bool:
        """Whether crops are float32 shares of the channels' ranges; else they are 8-bit levels."""
        return not isinstance(self.range, str)

    def describe(self) -> str:
        """The values in a few words: "values 102 to 3890, log"; empty for 8-bit levels."""
        if not self.is_deep:
            return ""
        ranges = ", ".join(f"{low:.6g} to {high:.6g}" for low, high in self.range)
        return f"values {ranges}" + (f", {self.transform}" if self.transform != "none" else "")


def check_range(value: Any) -> str | Ranges:
    """A range in its one form: one of `RANGES`, or (low, high) of each channel.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str):
        if value in RANGES:
            return value
    elif len(value) and all(not isinstance(pair, str | float | int) and len(pair) == 2 for pair in value):
        ranges = tuple((float(low), float(high)) for low, high in value)
        if all(math.isfinite(low) and math.isfinite(high) and low < high for low, high in ranges):
            return ranges
    raise ValueError(
        f"data.range is {value!r}: give {', '.join(RANGES)}, or [low, high] of each channel with low < high, "
        "as in [[0, 4095]]"
    )


AUTO = Reading("auto")
