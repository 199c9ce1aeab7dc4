"""Images as small as their views allow: of what a file has more of, no crop shows anything.

What is kept has `DECODED_PER_TARGET_PX` pixels for one of the smallest crop, along a side. A JPEG is kept as a decode that
is no finer than that needs, so that crops are those of the file; other images are resized. The size follows from the image's
size and the views alone. An image of which crops need nearly all is kept with all its pixels, or not at all.

Sizes are (height, width). Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simmim.data.deep import resize_shares
from simmim.data.orientation import Box, Size, stored_box, swaps_axes, turn_array_upright
from simmim.data.pictures import JpegPicture, Picture
from simmim.data.resizing import DECODED_PER_TARGET_PX, as_tensor, clip_box, get_interpolation, resize_box
from simmim.data.views import RandomView

SHRINK_BY = "bicubic"  # blurs crops less than bilinear, which halves the distance to crops of the file
MOST_SHARE = 0.5  # of an image's pixels; larger ones are not worth being kept
JPEG_REDUCTIONS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Shrunk:
    """What is kept of an image.

    Attributes:
        values: (channels, height, width) uint8 levels or float32 shares, as stored before it is turned upright.
        size: of the whole image, upright.
        across, down: its pixels in one of these, as stored.
        orientation: by which it is turned, as EXIF's.
        channels: of crops.
        loses_color: as of `Picture`.
    """

    values: np.ndarray
    size: Size
    across: float
    down: float
    orientation: int
    channels: int
    loses_color: bool


class ShrunkPicture(Picture):
    """A picture whose crops are of what is kept of it. Boxes are in pixels of the whole image."""

    def __init__(self, kept: Shrunk) -> None:
        self.kept, self.size, self.channels, self.loses_color = kept, kept.size, kept.channels, kept.loses_color
        self.is_deep = kept.values.dtype != np.uint8
        self.is_color = not self.is_deep and len(kept.values) in (1, 3)

    @functools.cached_property
    def image(self) -> Image.Image:  # type: ignore[override]
        """What is kept, for gray and color of 8 bits."""
        return Image.fromarray(self.pixels)

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """What is kept of gray and color of 8 bits: (height, width) or (height, width, 3)."""
        values = self.kept.values
        return np.ascontiguousarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))

    def crop(self, box: Box, size: Size, interpolation: str = "bilinear") -> Tensor:
        kept = self.kept
        left, top, right, bottom = stored_box(clip_box(box, self.size), self.size, kept.orientation)
        size = size[::-1] if swaps_axes(kept.orientation) else size
        box = (left / kept.across, top / kept.down, right / kept.across, bottom / kept.down)
        if self.is_color:
            pixels = resize_box(self.pixels, box, size, interpolation)
            return as_tensor(turn_array_upright(pixels, kept.orientation), self.channels)
        filter, (height, width) = get_interpolation(interpolation).resampling, size
        if self.is_deep:
            planes = [resize_shares(np.asarray(plane), box, size, filter) for plane in kept.values]
        else:
            resized = [Image.fromarray(plane).resize((width, height), filter, box=box) for plane in kept.values]
            planes = list(map(np.asarray, resized))
        return torch.from_numpy(np.stack(planes))

    def decoded(self) -> ShrunkPicture:
        return self


def needed_scale(views: Sequence[RandomView], size: Size) -> float:
    """The factor for an image at which the smallest crop of any view has as many pixels as it needs, at most 1."""
    return min(1.0, DECODED_PER_TARGET_PX * max(view.enlarged_from(size) for view in views))


def kept_size(views: Sequence[RandomView], size: Size, is_jpeg: bool, whole: bool = False) -> Size | None:
    """The size at which an image is kept; None where that is not worth it.

    Args:
        size: of the image.
        is_jpeg: whether a decoder reduces it.
        whole: keep an image that is hardly larger than crops need, too, with all its pixels.
    """
    scale, (height, width) = needed_scale(views, size), size
    if is_jpeg:
        reduction = max(step for step in JPEG_REDUCTIONS if step == 1 or 1 / step >= scale)
        kept = math.ceil(height / reduction), math.ceil(width / reduction)
    else:
        kept = math.ceil(height * scale), math.ceil(width * scale)
    if kept[0] * kept[1] <= MOST_SHARE * height * width:
        return kept
    return size if whole else None


def shrink(picture: Picture, views: Sequence[RandomView], whole: bool = False) -> ShrunkPicture | None:
    """A picture that has been opened as what is kept of it; None where that is not worth it.

    Args:
        whole: as of `kept_size`.

    Raises:
        One of `UNREADABLE` if the file turns out to be broken.
    """
    is_jpeg = isinstance(picture, JpegPicture)
    size = kept_size(views, picture.size, is_jpeg, whole)
    if size is None:
        return None
    height, width = picture.size
    if isinstance(picture, JpegPicture):
        image, reduction = picture.decode_at_least(needed_scale(views, picture.size))
        values = np.asarray(image)
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        turned = (picture.orientation, picture.channels, picture.loses_color)
        return ShrunkPicture(Shrunk(values, picture.size, reduction, reduction, *turned))
    values = picture.crop((0, 0, width, height), size, "nearest" if size == picture.size else SHRINK_BY).numpy()
    upright = (1, picture.channels, picture.loses_color)
    return ShrunkPicture(Shrunk(values, picture.size, width / size[1], height / size[0], *upright))
