"""Pictures whose values are deeper than 8 bits: they stay in the file's type until they are cropped, and crops are float32.

Sizes are (height, width). Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simmim.data.orientation import Box, Size
from simmim.data.pictures import Picture
from simmim.data.resizing import clip_box, get_interpolation, region_of
from simmim.messages import counted
from simmim.reading import Reading

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's conversion of color to gray
# Shares are log1p(DECADES · share) / log1p(DECADES), so that three decades below the top are told apart; asinh alike.
DECADES = 1000.0
TABLE_FROM = 2**16  # values of uint16 from which a table of all 65,536 is faster


@dataclass(frozen=True)
class StoredValues:
    """An image's values as its file stores them.

    Attributes:
        values: (channels, height, width) of bool or any real numbers, in memory or mapped from the file.
        nodata: the value that means that there is none; NaN always does.
        names: of the channels, where the file tells.
    """

    values: np.ndarray
    nodata: float | None = None
    names: tuple[str, ...] = ()

    @property
    def is_deep(self) -> bool:
        """Whether values have more than 8 bits."""
        return self.values.dtype not in (np.uint8, np.bool_)

    def select(self, reading: Reading) -> StoredValues:
        """The channels that are used, in their order.

        Raises:
            ValueError: for one that there is not.
        """
        if reading.channels_used is None:
            return self
        numbers = [self.number_of(channel) for channel in reading.channels_used]
        names = tuple(self.names[number] for number in numbers) if self.names else ()
        return replace(self, values=self.values[numbers], names=names)

    def number_of(self, channel: int | str) -> int:
        """The number of a channel, from 0.

        Args:
            channel: its number or name.

        Raises:
            ValueError: when there is no such channel.
        """
        if isinstance(channel, str):
            if channel not in self.names:
                raise ValueError(
                    f"data.channels_used: no channel {channel!r}; its channels are {', '.join(self.names) or 'not named'}"
                )
            return self.names.index(channel)
        if not 0 <= channel < len(self.values):
            raise ValueError(f"data.channels_used: no channel {channel}; it has {len(self.values)}, from 0 on")
        return channel


class RangeLengthError(ValueError):
    """Not one range for each channel.

    Args:
        ranges: that are given.
        channels: of the image.
    """

    def __init__(self, ranges: int, channels: int) -> None:
        self.ranges, self.channels = ranges, channels
        super().__init__(f"has {counted(channels, 'channel')}, and data.range is for {ranges}")


class DeepPicture(Picture):
    """Values as stored; `crop` returns float32 shares of each channel's range, NaN where there is no data.

    Values are clipped to the range before they are resized, so that a hot pixel reaches no further than a white one.

    Args:
        channels: of what `crop` returns; the file's own by default. Gray and color stand in for one another.

    Raises:
        RangeLengthError: when there is not one range for each channel.
    """

    def __init__(self, stored: StoredValues, channels: int | None, reading: Reading) -> None:
        planes, height, width = stored.values.shape
        self.stored, self.reading = stored, reading
        self.size: Size = (height, width)
        self.channels = channels or planes
        self.loses_color = (planes, self.channels) == (3, 1)
        if len(reading.range) != self.channels:
            raise RangeLengthError(len(reading.range), self.channels)

    def crop(self, box: Box, size: Size, interpolation: str = "bilinear") -> Tensor:
        """The part inside `box`, resized to `size`: (channels, height, width) float32, NaN where there is no data."""
        box, row = clip_box(box, self.size), get_interpolation(interpolation)
        region, box = region_of(box, size, row.reach)
        planes = len(self.stored.values)
        resized = np.stack([resize_shares(self.shares(plane, region), box, size, row.resampling) for plane in range(planes)])
        if self.loses_color:
            resized = np.tensordot(np.array(LUMA, np.float32), resized, axes=1)[None]
        return torch.from_numpy(np.array(np.broadcast_to(resized, (self.channels, *size)), order="C"))

    def shares(self, plane: int, region: tuple[slice, slice]) -> np.ndarray:
        """A part of a plane as shares of its range, float32, NaN where there is no data."""
        low, high = self.reading.range[plane if len(self.stored.values) == self.channels else 0]
        part = np.asarray(self.stored.values[plane][region])
        return as_shares(part, low, high, self.reading.transform, self.stored.nodata)

    def decoded(self) -> DeepPicture:
        return DeepPicture(replace(self.stored, values=np.array(self.stored.values)), self.channels, self.reading)


def resize_shares(shares: np.ndarray, box: Box, size: Size, resampling: Image.Resampling) -> np.ndarray:
    """(height, width) shares to `size`, in [0, 1]. Pixels without data take no part; where they are the greater part of what
    the filter looks at, there is no data in the result."""
    height, width = size

    def resize(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((width, height), resampling, box=box))

    missing = np.isnan(shares)
    if not missing.any():
        return resize(shares).clip(0, 1)
    weights = resize((~missing).astype(np.float32))
    values = resize(np.where(missing, np.float32(0), shares))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weights >= 0.5, values / weights, np.float32(np.nan)).clip(0, 1)


def as_shares(values: np.ndarray, low: float, high: float, transform: str, nodata: float | None = None) -> np.ndarray:
    """Values to shares of [low, high], clipped to [0, 1] and transformed: float32, NaN where there is no data."""
    if values.dtype == np.uint16 and values.size > TABLE_FROM:
        return _share_table(low, high, transform, nodata)[values]
    # Halves, because the span from the smallest to the largest float overflows.
    shares = np.clip((values.astype(np.float64) / 2 - low / 2) / (high / 2 - low / 2), 0, 1)
    if nodata is not None:
        shares[values == nodata] = np.nan
    if transform == "sqrt":
        shares = np.sqrt(shares)
    elif transform == "log":
        shares = np.log1p(DECADES * shares) / math.log1p(DECADES)
    elif transform == "asinh":
        shares = np.arcsinh(DECADES * shares) / math.asinh(DECADES)
    return shares.astype(np.float32)


@functools.lru_cache(maxsize=64)
def _share_table(low: float, high: float, transform: str, nodata: float | None) -> np.ndarray:
    """The share of each value of uint16."""
    # As uint32, which does not look for a table.
    return as_shares(np.arange(2**16, dtype=np.uint32), low, high, transform, nodata)
