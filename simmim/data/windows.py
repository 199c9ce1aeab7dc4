"""Image files of which parts are read: the pyramid of a file, and the values inside a box of one of its levels.

Sizes are (height, width). Boxes are (left, top, right, bottom) in whole pixels of a level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from simmim.data.deep import StoredValues
from simmim.data.orientation import Size

WindowBox = tuple[int, int, int, int]


class WindowedImage(ABC):
    """An open image.

    Attributes:
        levels: size of each level of the pyramid, the full resolution first; one without a pyramid.
        pixel_size: length of a pixel of the full resolution: µm, or the unit of a map; None where the file tells none.
        georeference: tags of a GeoTIFF by their code, as (type, count, value).
        num_bytes: in memory while it is open, beside the parts that are read.
    """

    levels: tuple[Size, ...]
    pixel_size: float | None = None
    georeference: Mapping[int, tuple] = MappingProxyType({})
    num_bytes: int = 0

    @abstractmethod
    def read(self, level: int, box: WindowBox) -> StoredValues:
        """The values inside a box of a level, (channels, height, width)."""

    def close(self) -> None:  # noqa: B027  # an image in memory has nothing to close
        """Close the file."""


class DecodedImage(WindowedImage):
    """An image that is in memory, or mapped from its file: for formats of which no part can be decoded alone."""

    def __init__(self, stored: StoredValues) -> None:
        self.stored = stored
        height, width = stored.values.shape[1:]
        self.levels = ((height, width),)
        self.num_bytes = 0 if isinstance(stored.values, np.memmap) else stored.values.nbytes

    def read(self, level: int, box: WindowBox) -> StoredValues:
        left, top, right, bottom = box
        return replace(self.stored, values=self.stored.values[:, top:bottom, left:right])


class ChannelImage(WindowedImage):
    """An image whose channels are files.

    Raises:
        ValueError: when they differ in size, or one of them has several channels.
    """

    def __init__(self, images: Sequence[WindowedImage], names: tuple[str, ...]) -> None:
        self.images, self.names = images, names
        self.levels, self.pixel_size = images[0].levels, images[0].pixel_size
        self.georeference = images[0].georeference
        self.num_bytes = sum(image.num_bytes for image in images)
        if any(image.levels != self.levels for image in images):
            shown = ", ".join(sorted({"{}x{}".format(*image.levels[0]) for image in images}))
            raise ValueError(f"its channels differ in size (height x width) or in their pyramids: {shown}")

    def read(self, level: int, box: WindowBox) -> StoredValues:
        parts = [image.read(level, box) for image in self.images]
        if any(len(part.values) != 1 for part in parts):
            raise ValueError("one of its channels' files has several channels itself")
        nodata = {part.nodata for part in parts}
        values = np.concatenate([part.values for part in parts])
        return StoredValues(values, nodata.pop() if len(nodata) == 1 else None, self.names)

    def close(self) -> None:
        for image in self.images:
            image.close()
