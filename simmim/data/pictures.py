"""Pictures: opened images that are decoded when a view asks for a part of them.

A JPEG is decoded for every crop, no finer than the crop needs; other formats are decoded when they are opened. Images of 1
or 3 channels go through Pillow; arrays with other counts are resized channel by channel by the same filter.

Sizes are (height, width). Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simmim.data.orientation import (
    Box,
    Size,
    read_orientation,
    stored_box,
    swaps_axes,
    turn_array_upright,
    turn_upright,
    upright_size,
)
from simmim.data.pillow_guard import decoding, open_pillow
from simmim.data.pixel_values import finite_range, scale_to_255, to_gray_or_rgb
from simmim.data.records import Record, open_record
from simmim.data.resizing import as_tensor, clip_box, get_interpolation, region_of, resize_box


class Picture:
    """One image in memory.

    Args:
        image: of any of Pillow's modes.
        channels: of what `crop` returns; the image's own, 1 or 3, by default.

    Attributes:
        size: (height, width) in pixels, upright.
        channels: of what `crop` returns.
        image: the pixels, in mode L or RGB.
        loses_color: whether the file is in color and `crop` returns gray.
    """

    loses_color = False

    def __init__(self, image: Image.Image, channels: int | None = None) -> None:
        converted = to_gray_or_rgb(image)
        self.loses_color = channels == 1 and converted.mode == "RGB"
        self.image = converted.convert("L") if channels == 1 else converted
        self.size: Size = (image.height, image.width)
        self.channels = channels or len(converted.getbands())

    def crop(self, box: Box, size: Size, interpolation: str = "bilinear") -> Tensor:
        """The part inside `box`, resized to `size`: (channels, height, width) uint8.

        Args:
            box: (left, top, right, bottom) in upright pixels.
            size: (height, width) of the result.
            interpolation: one of `INTERPOLATIONS`.

        Raises:
            One of `UNREADABLE` if the file turns out to be broken; ValueError for an empty box and for an unknown
            interpolation.
        """
        return as_tensor(resize_box(self.image, clip_box(box, self.size), size, interpolation), self.channels)

    def decoded(self) -> Picture:
        """This picture with all its pixels in memory and no file open."""
        return self


class JpegPicture(Picture):
    """A JPEG file of which only the header is read. Every crop decodes it again, as coarsely as the crop allows.

    Attributes:
        reduction: how many times smaller than the file the latest decode was; None before the first.
    """

    def __init__(self, record: Record, image: Image.Image, channels: int | None) -> None:
        self.record = record
        self.opened: Image.Image | None = image
        self.channels = channels or (1 if image.mode == "L" else 3)
        self.loses_color = channels == 1 and image.mode != "L"
        self.orientation = read_orientation(image)
        self.size = upright_size(image, self.orientation)
        self.reduction: float | None = None

    def __del__(self) -> None:
        if self.opened is not None:
            self.opened.fp.close()  # type: ignore[attr-defined]

    def crop(self, box: Box, size: Size, interpolation: str = "bilinear") -> Tensor:
        """As `Picture.crop`, decoding no finer than `size` needs."""
        box, decoded_per_target_px = clip_box(box, self.size), get_interpolation(interpolation).decoded_per_target_px
        if math.isinf(decoded_per_target_px):
            # Turned before it is resized: of two pixels equally near, Pillow takes the right or lower one.
            return self.decoded().crop(box, size, interpolation)
        left, top, right, bottom = stored_box(box, self.size, self.orientation)
        height, width = size[::-1] if swaps_axes(self.orientation) else size
        image = self._decode(max(width / (right - left), height / (bottom - top)) * decoded_per_target_px)
        # An odd last row or column makes the coarse image larger than its reduction says, never smaller.
        reduction = self.reduction or 1.0  # a decode has set it
        reduced = (left / reduction, top / reduction, right / reduction, bottom / reduction)
        pixels = resize_box(image, reduced, (height, width), interpolation)
        return as_tensor(turn_array_upright(pixels, self.orientation), self.channels)

    def decode_at_least(self, share: float) -> tuple[Image.Image, float]:
        """The stored image in mode L or RGB, with at least `share` of its pixels along a side, and how many times smaller
        than the file it is."""
        image = self._decode(share)
        return image, self.reduction or 1.0

    def decoded(self) -> Picture:
        picture = Picture(turn_upright(self._decode(1), self.orientation), self.channels)
        picture.loses_color = self.loses_color  # decoded as gray, it would not tell
        return picture

    def _decode(self, share: float) -> Image.Image:
        """The stored image in mode L or RGB, with at least `share` of its pixels along a side."""
        with decoding():
            image, self.opened = self.opened or open_pillow(open_record(self.record)), None
            with image.fp:  # type: ignore[attr-defined]
                width = image.width
                # Pillow's (width, height).
                wanted = max(1, math.ceil(width * share)), max(1, math.ceil(image.height * share))
                draft = image.draft("L" if self.channels == 1 else None, wanted)
                image.load()
            self.reduction = width / draft[1][2] if draft else 1.0
            return to_gray_or_rgb(image)


class ArrayPicture(Picture):
    """An array with any number of channels, in memory or on disk. Values other than uint8 and bool are scaled to 8 bits
    when they are cropped.

    Args:
        values: (channels, height, width) of bool or any real numbers.
        ends: the values that become 0 and 255; the smallest and largest of the array by default.
    """

    def __init__(self, values: np.ndarray, ends: tuple[float, float] | None = None) -> None:
        self.values, self.ends = values, ends
        self.channels, *size = values.shape
        self.size = tuple(size)

    @functools.cached_property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value of all channels together, so that the channels' ratios stay."""
        if self.ends:
            return self.ends
        lows, highs = zip(*map(finite_range, self.values))
        return min(lows), max(highs)

    def crop(self, box: Box, size: Size, interpolation: str = "bilinear") -> Tensor:
        """As `Picture.crop`, channel by channel."""
        box, row = clip_box(box, self.size), get_interpolation(interpolation)
        (height, width), (region, box) = size, region_of(box, size, row.reach)
        channels = []
        for channel in self.values:
            image = Image.fromarray(np.ascontiguousarray(self._to_levels(channel[region])))
            channels.append(np.asarray(image.resize((width, height), row.resampling, box=box)))
        # Beside an edge the sharper filters exceed the values' range.
        return torch.from_numpy(np.stack(channels).round().clip(0, 255).astype(np.uint8))

    def decoded(self) -> ArrayPicture:
        return ArrayPicture(np.stack([self._to_levels(channel).round().astype(np.uint8) for channel in self.values]))

    def _to_levels(self, part: np.ndarray) -> np.ndarray:
        """Values of a part of a channel in [0, 255], uint8 or float32."""
        if part.dtype == np.uint8:
            return part
        return part * np.uint8(255) if part.dtype == bool else scale_to_255(part, *self.range)
