"""Formats that Pillow does not read, or reads in part: one object each, listed in `known_formats`."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import BinaryIO, ClassVar

import numpy as np

from simmim.data.addresses import parse_address
from simmim.data.deep import StoredValues
from simmim.data.file_checks import BY_TILES, check_size, pick_image
from simmim.data.records import Record
from simmim.data.slides import SlideImage, vendor_of
from simmim.data.tiff import divide_pages, open_tiff, read_pages
from simmim.data.tiff_windows import GEO_TAGS, TiffImage
from simmim.data.windows import DecodedImage, WindowedImage
from simmim.reading import Reading

NUMPY_MAGIC = b"\x93NUMPY"
HEAD_BYTES = 256  # of a file, by which formats are told
SLIDE, MAP, MICROSCOPY = KINDS_WITHOUT_UP = ("slide", "georeferenced image", "micrograph")
PHILIPS = "philips"  # OpenSlide's name
# By tifffile's names. ImageJ writes images of all kinds.
SLIDE_FILES = ("is_svs", "is_ndpi", "is_scn", "is_bif", "is_qpi", "is_philips")
MICROSCOPE_FILES = ("is_ome", "is_stk", "is_lsm", "is_fluoview", "is_micromanager")


class FileFormat(ABC):
    """Reads one format of image files.

    Attributes:
        name: as `simmim check-data` counts it.
    """

    name: ClassVar[str]

    @abstractmethod
    def detect(self, head: bytes) -> bool:
        """Whether a file that begins with `head`, `HEAD_BYTES` of it, is of this format."""

    @abstractmethod
    def read(self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int) -> StoredValues:
        """The values of an image.

        Args:
            stream: of the file.
            record: that it was opened from.
            page: number of the image in a file of several; None for a file of one.
            max_pixels: larger images are refused before they are decoded.

        Raises:
            Exception: of any kind, for a file that cannot be read.
        """

    def count(self, stream: BinaryIO, reading: Reading) -> int:
        """How many images the file holds."""
        return 1

    def kind_without_up(self, stream: BinaryIO) -> str | None:
        """What the file is where its metadata tell that no side of its images is up: one of `KINDS_WITHOUT_UP`.

        Raises:
            Exception: as `read`.
        """
        return None

    def open_windows(
        self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int
    ) -> WindowedImage:
        """An image of which parts are read; by default it is decoded whole.

        Args:
            stream: closed by the image, or before this returns.
            record, reading, page: as of `read`.
            max_pixels: that may be decoded at once.

        Raises:
            Exception: as `read`.
        """
        with stream:
            return DecodedImage(self.read(stream, record, reading, page, max_pixels))


class NpyFormat(FileFormat):
    """NumPy's arrays, memory-mapped where they are files on disk."""

    name = "NPY"

    def detect(self, head: bytes) -> bool:
        return head.startswith(NUMPY_MAGIC)

    def read(self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int) -> StoredValues:
        stream.seek(0)
        on_disk = record["bytes"] is None
        file = parse_address(record["path"] or "").files[0] if on_disk else stream
        values = np.load(file, mmap_mode="r" if on_disk else None, allow_pickle=False)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"holds {values.dtype} values, not real numbers")
        if values.ndim not in (2, 3):
            raise ValueError(f"an array of {values.ndim} dimensions, expected 2 or 3")
        if values.ndim == 2:
            values = values[None]
        elif values.shape[2] <= values.shape[0]:
            values = values.transpose(2, 0, 1)
        check_size(values.shape[1:], max_pixels, BY_TILES)
        return StoredValues(values)

    def open_windows(
        self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int
    ) -> WindowedImage:
        with stream:  # a file on disk is mapped, and may be of any size
            limit = max_pixels if record["bytes"] is not None else sys.maxsize
            return DecodedImage(self.read(stream, record, reading, page, limit))


class TiffFormat(FileFormat):
    """TIFF, BigTIFF, OME-TIFF, ImageJ's and GeoTIFF, by tifffile."""

    name = "TIFF"

    def detect(self, head: bytes) -> bool:
        return head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))  # the latter two are BigTIFF's

    def read(self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int) -> StoredValues:
        with open_tiff(stream) as tiff:
            first = tiff.pages.first
            check_size((first.imagelength, first.imagewidth), max_pixels, BY_TILES)
            return read_pages(tiff, pick_image(divide_pages(tiff, reading.pages), page))

    def count(self, stream: BinaryIO, reading: Reading) -> int:
        with open_tiff(stream) as tiff:
            return len(divide_pages(tiff, reading.pages))

    def kind_without_up(self, stream: BinaryIO) -> str | None:
        with open_tiff(stream) as tiff:
            if any(getattr(tiff, name) for name in SLIDE_FILES):
                return SLIDE
            if any(tag in tiff.pages.first.tags for tag in GEO_TAGS):
                return MAP
            return MICROSCOPY if any(getattr(tiff, name) for name in MICROSCOPE_FILES) else None

    def open_windows(
        self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int
    ) -> WindowedImage:
        try:
            image = TiffImage(stream, reading.pages, page, max_pixels)
        except BaseException:
            stream.close()
            raise
        # Tiles that Philips' scanner left out are background in OpenSlide, and black in tifffile.
        if image.tiff.is_philips and record["bytes"] is None:
            path = parse_address(record["path"] or "").files[0]
            if vendor_of(path) == PHILIPS:
                image.close()
                return SlideImage(path)
        return image
