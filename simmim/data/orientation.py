"""EXIF's orientation: stored pictures, upright pictures, and where a box of one lies in the other.

Sizes are (height, width). Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

Size = tuple[int, int]
Box = tuple[float, float, float, float]

ORIENTATION = 0x0112  # number of the tag, in EXIF and TIFF


class Orientation(NamedTuple):
    """How a stored picture is turned upright.

    Attributes:
        transpose: Pillow's operation that does it.
        flips_x: the upright picture's x axis runs against the stored axis it comes from.
        flips_y: the same of the y axis.
        swaps_axes: height and width are exchanged.
    """

    transpose: Image.Transpose
    flips_x: bool
    flips_y: bool
    swaps_axes: bool


# By the tag's value. 1 is upright.
ORIENTATIONS = {
    2: Orientation(Image.Transpose.FLIP_LEFT_RIGHT, True, False, False),
    3: Orientation(Image.Transpose.ROTATE_180, True, True, False),
    4: Orientation(Image.Transpose.FLIP_TOP_BOTTOM, False, True, False),
    5: Orientation(Image.Transpose.TRANSPOSE, False, False, True),
    6: Orientation(Image.Transpose.ROTATE_270, True, False, True),
    7: Orientation(Image.Transpose.TRANSVERSE, True, True, True),
    8: Orientation(Image.Transpose.ROTATE_90, False, True, True),
}


def read_orientation(image: Image.Image) -> int:
    """The tag's value, 1 to 8; 1 if there is no tag or EXIF is broken, which is no reason to lose the image."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return value if value in ORIENTATIONS else 1


def upright_size(image: Image.Image, orientation: int) -> Size:
    """(height, width) of a stored image after it is turned upright."""
    width, height = image.size
    return (width, height) if swaps_axes(orientation) else (height, width)


def swaps_axes(orientation: int) -> bool:
    """Whether turning upright exchanges height and width."""
    return orientation in ORIENTATIONS and ORIENTATIONS[orientation].swaps_axes


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """A stored image, upright."""
    return image.transpose(ORIENTATIONS[orientation].transpose) if orientation in ORIENTATIONS else image


def turn_array_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (channels, height, width), upright; a view of the same memory."""
    if orientation not in ORIENTATIONS:
        return pixels
    _, flips_x, flips_y, swapped = ORIENTATIONS[orientation]
    pixels = pixels.swapaxes(1, 2) if swapped else pixels
    return pixels[:, :: -1 if flips_y else 1, :: -1 if flips_x else 1]


def stored_box(box: Box, size: Size, orientation: int) -> Box:
    """Where a box of the upright picture of `size` lies in the stored picture."""
    if orientation not in ORIENTATIONS:
        return box
    left, top, right, bottom = box
    height, width = size
    _, flips_x, flips_y, swapped = ORIENTATIONS[orientation]
    if flips_x:
        left, right = width - right, width - left
    if flips_y:
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if swapped else (left, top, right, bottom)
