"""Images that are no file alone, but a folder or several files: one object each kind, listed in `known_formats`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import ClassVar

from simmim.data.deep import StoredValues
from simmim.data.file_checks import BY_TILES, check_size
from simmim.data.file_formats import MICROSCOPY, SLIDE
from simmim.data.slides import SlideImage, vendor_of
from simmim.data.windows import WindowedImage
from simmim.data.zarr_folders import is_zarr, read_layout
from simmim.data.zarr_images import ZarrImage, count_pages
from simmim.reading import Reading


class PathFormat(ABC):
    """Reads one kind of image from its path.

    Attributes:
        name: as `simmim check-data` counts it.
    """

    name: ClassVar[str]

    @abstractmethod
    def detect(self, path: str) -> bool:
        """Whether an image at `path` is of this kind."""

    @abstractmethod
    def open_windows(self, path: str, reading: Reading, page: int | None, max_pixels: int) -> WindowedImage:
        """An image of which parts are read.

        Args:
            page: number of the image where there are several; None where there is one.
            max_pixels: that may be decoded at once.

        Raises:
            Exception: of any kind, for an image that cannot be read.
        """

    def read(self, path: str, reading: Reading, page: int | None, max_pixels: int) -> StoredValues:
        """The values of an image.

        Args:
            page: as of `open_windows`.
            max_pixels: larger images are refused before they are decoded.

        Raises:
            Exception: as `open_windows`.
        """
        image = self.open_windows(path, reading, page, max_pixels)
        try:
            height, width = image.levels[0]
            check_size((height, width), max_pixels, BY_TILES)
            return image.read(0, (0, 0, width, height))
        finally:
            image.close()

    def count(self, path: str, reading: Reading) -> int:
        """How many images there are."""
        return 1

    def kind_without_up(self, path: str) -> str | None:
        """As of `FileFormat`."""
        return None


SLIDE_ENDINGS = (".mrxs", ".vms", ".vmu", ".svslide", ".czi", ".bif")
# Of Leica's TIFF files tifffile reads one region, if not the overview.
SCN, LEICA = ".scn", "leica"


class SlideFormat(PathFormat):
    """Whole slides that only OpenSlide reads, and Leica's where it is installed."""

    name = "OpenSlide"

    def detect(self, path: str) -> bool:
        ending = os.path.splitext(path)[1].lower()
        return ending in SLIDE_ENDINGS or (ending == SCN and vendor_of(path) == LEICA)

    def open_windows(self, path: str, reading: Reading, page: int | None, max_pixels: int) -> WindowedImage:
        return SlideImage(path)

    def kind_without_up(self, path: str) -> str | None:
        return SLIDE


class ZarrFormat(PathFormat):
    """OME-Zarr and Zarr arrays, by zarr."""

    name = "Zarr"

    def detect(self, path: str) -> bool:
        return is_zarr(path) and not os.path.isfile(path)  # a picture may lie in a folder of that name

    def open_windows(self, path: str, reading: Reading, page: int | None, max_pixels: int) -> WindowedImage:
        return ZarrImage(path, reading.pages, page, max_pixels)

    def count(self, path: str, reading: Reading) -> int:
        return count_pages(path, reading.pages)

    def kind_without_up(self, path: str) -> str | None:
        return MICROSCOPY if read_layout(path).is_ome else None
