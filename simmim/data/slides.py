"""Whole slides through OpenSlide: pyramids of one file or several, in 8-bit color.

Sizes are (height, width). Boxes are (left, top, right, bottom) in whole pixels of a level.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from simmim.data.deep import StoredValues
from simmim.data.windows import WindowBox, WindowedImage
from simmim.messages import first_line

WHITE = "FFFFFF"
CACHE_BYTES = 32 * 2**20  # that OpenSlide keeps of decoded tiles by default, for each open slide


class SlideImage(WindowedImage):
    """A slide. What was not scanned has the color that the slide names as its background, else white.

    Args:
        path: of the slide's file.

    Raises:
        OSError: for a missing file.
        ValueError: for files that OpenSlide does not read; where it is not installed.
    """

    num_bytes = CACHE_BYTES

    def __init__(self, path: str) -> None:
        self.path = path
        self.slide = open_slide(path)
        self.levels = tuple((height, width) for width, height in self.slide.level_dimensions)
        self.pixel_size = length_of(self.slide.properties.get("openslide.mpp-x"))
        color = self.slide.properties.get("openslide.background-color", WHITE)
        self.background = np.frombuffer(bytes.fromhex(color), np.uint8)
        self.read(len(self.levels) - 1, (0, 0, 1, 1))  # a file that is missing is told now

    def read(self, level: int, box: WindowBox) -> StoredValues:
        left, top, right, bottom = box
        downsampling = self.slide.level_downsamples[level]
        corner = round(left * downsampling), round(top * downsampling)  # in pixels of the full resolution
        try:
            region = np.asarray(self.slide.read_region(corner, level, (right - left, bottom - top)))
        except import_openslide().OpenSlideError as error:
            # After an error OpenSlide reads no further part of a slide.
            self.slide.close()
            self.slide = open_slide(self.path)
            raise ValueError(f"OpenSlide cannot read it: {first_line(error)}") from error
        return StoredValues(np.moveaxis(lay_over(region, self.background), -1, 0))

    def close(self) -> None:
        self.slide.close()


def lay_over(region: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(height, width, 4) of RGBA over a color: (height, width, 3) uint8."""
    values, opacity = region[..., :3], region[..., 3:]
    if (opacity == 255).all():
        return values
    share = opacity / np.float32(255)
    return (values * share + background * (1 - share)).round().astype(np.uint8)


def import_openslide() -> Any:
    """The library.

    Raises:
        ValueError: where it is not installed, or its shared library is not.
    """
    try:
        import openslide
    except (ImportError, OSError):
        raise ValueError("a whole slide: pip install 'simmim-toolkit[slides]'") from None
    return openslide


def open_slide(path: str) -> Any:
    """An `openslide.OpenSlide`.

    Raises:
        OSError: for a missing file.
        ValueError: for files that it does not read.
    """
    openslide = import_openslide()
    os.stat(path)
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise ValueError(
            f"no slide that OpenSlide reads ({first_line(error)}): the files that belong to it must lie beside it"
        ) from error


def vendor_of(path: str) -> str | None:
    """OpenSlide's name of a slide's format; None for other files, and where it is not installed."""
    try:
        return import_openslide().OpenSlide.detect_format(path)
    except ValueError:
        return None


def length_of(text: str | None) -> float | None:
    """A positive number of a property; None for anything else."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
