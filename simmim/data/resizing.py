"""Cropping and resizing in one step, by one of `INTERPOLATIONS`.

Sizes are (height, width). Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simmim.data.orientation import Box, Size
from simmim.data.resampling import get_resampler

# A JPEG is decoded at the coarsest of 1, 1/2, 1/4, 1/8 that leaves at least this many pixels per target pixel along either
# side. Measured on crops of 0.67 and more of 1600x1200 photos to 192 px, in dB against a full decode (mean, worst) and ms
# (18 in full): 1 and 1.25 alike 47, 43, 5.2; 1.5: 51, 44, 6.8; 2: 54, 51, 8.0. 47 dB is 1.1 levels root mean square.
DECODED_PER_TARGET_PX = 1.25
# Sharper filters show more of what a coarse decode loses. Bicubic, photos of 1600x1200 and 4000x3000 to 224 px: at 1.25
# 39 to 45 dB and 5 to 10 levels off in the worst 1 % of pixels; at 2: 48 to 53 dB, 3 levels at most, Lanczos alike.
SHARP_DECODED_PER_TARGET_PX = 2.0
# Source pixels per target pixel along a side from which Pillow's `reducing_gap`, the average of whole pixels before the
# filter, is faster than torch's filter. Pillow's manual calls the result with a gap of 3 nearly that of the filter alone.
# For bilinear only: with the sharper filters it is up to 5 levels off.
REDUCING_FROM, REDUCING_GAP = 8.0, 3.0
THUMBNAIL_PIXELS = 128 * 128  # up to this size torch's start costs more than its filter gains


class Interpolation(NamedTuple):
    """A filter that images are resized by. All but nearest are antialiased where they shrink an image.

    Attributes:
        resampling: Pillow's.
        reach: radius of the filter, in target pixels if the image shrinks, in its own pixels if it grows.
        decoded_per_target_px: pixels per target pixel that decoding a JPEG leaves at least; infinite if pixels must not be
            averaged.
        in_torch: whether torch has the same filter.
    """

    resampling: Image.Resampling
    reach: int
    decoded_per_target_px: float
    in_torch: bool = False


INTERPOLATIONS = {
    "nearest": Interpolation(Image.Resampling.NEAREST, 1, math.inf),
    "bilinear": Interpolation(Image.Resampling.BILINEAR, 1, DECODED_PER_TARGET_PX, in_torch=True),
    "bicubic": Interpolation(Image.Resampling.BICUBIC, 2, SHARP_DECODED_PER_TARGET_PX, in_torch=True),
    "lanczos": Interpolation(Image.Resampling.LANCZOS, 3, SHARP_DECODED_PER_TARGET_PX),
}


def get_interpolation(name: str) -> Interpolation:
    """The row of `INTERPOLATIONS` with this name.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {name!r}: give one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


def clip_box(box: Box, size: Size) -> Box:
    """`box` without what rounding has put outside a picture of `size`, which Pillow would refuse.

    Raises:
        ValueError: for a box that is empty or further outside.
    """
    (left, top, right, bottom), (height, width) = box, size
    if not (-1 < left < right < width + 1 and -1 < top < bottom < height + 1):
        raise ValueError(f"no box of a picture of {height}x{width} pixels (height x width): {box}")
    return max(left, 0), max(top, 0), min(right, width), min(bottom, height)


def region_of(box: Box, size: Size, reach: int) -> tuple[tuple[slice, slice], Box]:
    """The whole pixels that a filter of radius `reach` looks at when `box` is resized to `size`, and the box in them."""
    (height, width), (left, top, right, bottom) = size, box
    # The filter reaches over the edges of the box.
    margin_x, margin_y = reach * ((right - left) / width + 2), reach * ((bottom - top) / height + 2)
    first_x, first_y = max(0, math.floor(left - margin_x)), max(0, math.floor(top - margin_y))
    region = slice(first_y, math.ceil(bottom + margin_y)), slice(first_x, math.ceil(right + margin_x))
    return region, (left - first_x, top - first_y, right - first_x, bottom - first_y)


def resize_box(image: Image.Image | np.ndarray, box: Box, size: Size, interpolation: str) -> np.ndarray:
    """The part of an image inside `box`, resized to `size`: (bands, height, width) uint8.

    All ways compute the same filter: ours in C as Pillow does, torch within 1 level (bicubic but for 1 pixel in 1,000,
    beside edges, where it matters which axis goes first). Pillow's filter looks over the edges of a fractional box. For a
    box of whole pixels torch is two to three times as fast as Pillow, 0.3 ms for 0.9 of a photo of 500x375 pixels; for a
    thumbnail Pillow is faster, 20 µs against 110 for a digit. For a fractional box ours takes 0.12 ms where Pillow takes
    0.63.

    Args:
        image: of mode L or RGB, or its pixels, (height, width) or (height, width, 3) uint8.
    """
    row, may_reduce = get_interpolation(interpolation), interpolation == "bilinear"
    box_width, box_height = box[2] - box[0], box[3] - box[1]
    whole_pixels = all(float(edge).is_integer() for edge in box)
    if whole_pixels:
        image, box = crop_pixels(image, tuple(map(int, box))), (0, 0, box_width, box_height)  # type: ignore[arg-type]
    factor = max(box_height / size[0], box_width / size[1])
    if box_height * box_width > THUMBNAIL_PIXELS:
        if whole_pixels and row.in_torch and not (may_reduce and factor >= REDUCING_FROM):
            tensor = torch.from_numpy(np.array(image))
            tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
            return torch.nn.functional.interpolate(tensor[None], size, mode=interpolation, antialias=True)[0].numpy()
        # At twice the gap Pillow averages pixels.
        if may_reduce and factor < 2 * REDUCING_GAP and (resampler := get_resampler()):
            pixels, origin, whole = pixels_of(image, box, size)
            return resampler(pixels, box, size, origin, whole)
    height, width = size
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    resized = image.resize((width, height), row.resampling, box=box, reducing_gap=REDUCING_GAP if may_reduce else None)
    pixels = np.array(resized)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def crop_pixels(image: Image.Image | np.ndarray, box: tuple[int, int, int, int]) -> Image.Image | np.ndarray:
    """The part of an image, or of its pixels, inside a box of whole pixels."""
    left, top, right, bottom = box
    return image.crop(box) if isinstance(image, Image.Image) else image[top:bottom, left:right]


def pixels_of(image: Image.Image | np.ndarray, box: Box, size: Size) -> tuple[np.ndarray, tuple[int, int], Size]:
    """What a bilinear filter looks at when `box` is resized to `size`, or more of the image: pixels as `resize_box` takes
    them, the (left, top) of these in the image, and the image's size."""
    if isinstance(image, np.ndarray):
        return image, (0, 0), image.shape[:2]  # type: ignore[return-value]
    (rows, columns), _ = region_of(box, size, INTERPOLATIONS["bilinear"].reach)
    top, left, bottom, right = rows.start, columns.start, min(rows.stop, image.height), min(columns.stop, image.width)
    if (bottom - top) * (right - left) > image.height * image.width / 2:
        return np.asarray(image), (0, 0), (image.height, image.width)
    return np.asarray(image.crop((left, top, right, bottom))), (left, top), (image.height, image.width)


def as_tensor(pixels: np.ndarray, channels: int) -> Tensor:
    """(bands, height, width) as a tensor, without a copy where that can be; one band is repeated for several channels."""
    if len(pixels) == channels and pixels.flags.c_contiguous and pixels.flags.writeable:
        return torch.from_numpy(pixels)
    return torch.from_numpy(np.array(np.broadcast_to(pixels, (channels, *pixels.shape[1:])), order="C"))
