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
PAGES = ("channels", "images", "first")
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
        pages: of files that hold several: channels or images, or the first alone. None goes by what the file says, and
            refuses one that says nothing.
        channel_files: pattern of the names of files that hold one channel each.
        channels_used: numbers of the channels that are used, from 0, in this order; names are settled by
            `simmim.data.measure_images`. None for all.
        channel_names: of the channels that are used; empty where nothing names them.
    """

    range: Any = "image"
    transform: str = "none"
    pages: str | None = "first"
    channel_files: str | None = None
    channels_used: tuple[int | str, ...] | None = None
    channel_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "range", check_range(self.range))
        if self.transform not in TRANSFORMS:
            raise ValueError(f"unknown data.transform {self.transform!r}: give one of {', '.join(TRANSFORMS)}")
        if self.pages not in (None, *PAGES):
            raise ValueError(f"unknown data.pages {self.pages!r}: give one of {', '.join(PAGES)}")
        if self.channels_used is not None:
            object.__setattr__(self, "channels_used", tuple(self.channels_used))
            if not self.channels_used or len(set(self.channels_used)) < len(self.channels_used):
                raise ValueError(f"data.channels_used is {list(self.channels_used)}: give channels, each once")
        object.__setattr__(self, "channel_names", tuple(map(str, self.channel_names)))
        if self.transform != "none" and self.range == "image":
            raise ValueError("data.transform needs one range for all images: give data.range auto, type, or numbers")

    @property
    def is_deep(self) -> bool:
        """Whether crops are float32 shares of the channels' ranges; else they are 8-bit levels."""
        return not isinstance(self.range, str)

    @property
    def rearranges(self) -> bool:
        """Whether an image may be another thing than a file."""
        return self.channel_files is not None or self.pages not in ("first", "channels")

    def describe(self) -> str:
        """The channels and their values in a few words: "values DAPI 102 to 3890, GFP 90 to 700, log"; empty for 8-bit
        levels of channels without names."""
        if not self.is_deep:
            return f"channels {', '.join(self.channel_names)}" if self.channel_names else ""
        # "1 0 to 4095" could not be read.
        names = [f"channel {name}:" if name[:1].isdigit() else name for name in self.channel_names] or [""] * len(self.range)
        ranges = ", ".join(f"{name} {low:.6g} to {high:.6g}".strip() for name, (low, high) in zip(names, self.range))
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


AUTO = Reading("auto", pages=None)


@dataclass(frozen=True)
class TileSettings:
    """Which part of an image is a tile.

    Args:
        size_px: side of a tile, in pixels of its resolution.
        level: of the files' pyramids, 0 for the full resolution.
        pixel_size: length of a tile's pixel in the files' unit, µm or a map's, in place of a level.
        max_background: tiles with a larger share of background are empty, and left out; 1 leaves out none.

    Raises:
        ValueError: for numbers out of range, and a level together with a length.
    """

    size_px: int
    level: int | None = None
    pixel_size: float | None = None
    max_background: float = 0.95

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise ValueError(f"data.tile is {self.size_px}: give the side of a tile in pixels, as 512")
        if self.level is not None and self.pixel_size is not None:
            raise ValueError("both data.tile_level and data.pixel_size are given: give one of them")
        if self.level is not None and self.level < 0:
            raise ValueError(f"data.tile_level is {self.level}: give 0 for the full resolution, or more")
        if self.pixel_size is not None and not 0 < self.pixel_size < math.inf:
            raise ValueError(f"data.pixel_size is {self.pixel_size}: give the length of a pixel, as 0.5")
        if not 0 < self.max_background <= 1:
            raise ValueError(f"data.max_background is {self.max_background}: give a share above 0; 1 leaves out no tile")


def tile_settings(
    size_px: int | None, level: int | None, pixel_size: float | None, max_background: float = 0.95
) -> TileSettings | None:
    """`TileSettings`; None where images are read whole.

    Raises:
        ValueError: as `TileSettings`, and for a level or a length without tiles.
    """
    if size_px is not None:
        return TileSettings(size_px, level, pixel_size, max_background)
    for name, value in (("tile_level", level), ("pixel_size", pixel_size)):
        if value is not None:
            raise ValueError(f"data.{name} is of tiles: give data.tile, their side in pixels")
    return None
