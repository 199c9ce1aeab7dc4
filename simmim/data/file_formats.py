"""Formats that Pillow does not read, or reads in part: one object each, listed in `known_formats`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import BinaryIO, ClassVar

import numpy as np

from simmim.data.deep import StoredValues
from simmim.data.orientation import Size
from simmim.data.records import Record
from simmim.data.tiff import divide_pages, open_tiff, read_pages
from simmim.messages import counted
from simmim.reading import Reading

NUMPY_MAGIC = b"\x93NUMPY"
HEAD_BYTES = 256  # of a file, by which formats are told


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


class NpyFormat(FileFormat):
    """NumPy's arrays, memory-mapped where they are files on disk."""

    name = "NPY"

    def detect(self, head: bytes) -> bool:
        return head.startswith(NUMPY_MAGIC)

    def read(self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int) -> StoredValues:
        stream.seek(0)
        on_disk = record["bytes"] is None
        values = np.load(record["path"] if on_disk else stream, mmap_mode="r" if on_disk else None, allow_pickle=False)  # type: ignore[arg-type]
        if values.dtype.kind not in "biuf":
            raise ValueError(f"holds {values.dtype} values, not real numbers")
        if values.ndim not in (2, 3):
            raise ValueError(f"an array of {values.ndim} dimensions, expected 2 or 3")
        if values.ndim == 2:
            values = values[None]
        elif values.shape[2] <= values.shape[0]:
            values = values.transpose(2, 0, 1)
        check_size(values.shape[1:], max_pixels)
        return StoredValues(values)


class TiffFormat(FileFormat):
    """TIFF, BigTIFF, OME-TIFF, ImageJ's and GeoTIFF, by tifffile."""

    name = "TIFF"

    def detect(self, head: bytes) -> bool:
        return head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))  # the latter two are BigTIFF's

    def read(self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int) -> StoredValues:
        with open_tiff(stream) as tiff:
            first = tiff.pages.first
            check_size((first.imagelength, first.imagewidth), max_pixels)
            return read_pages(tiff, pick_image(divide_pages(tiff, reading.pages), page))

    def count(self, stream: BinaryIO, reading: Reading) -> int:
        with open_tiff(stream) as tiff:
            return len(divide_pages(tiff, reading.pages))


def pick_image(images: list[tuple[int, ...]], page: int | None) -> tuple[int, ...]:
    """The pages of one of a file's images.

    Raises:
        ValueError: when the file holds several and none is asked for, or fewer than that.
    """
    if page is None and len(images) > 1:
        raise ValueError(
            f"holds {counted(len(images), 'image')}, and a source that is read in order does not divide files: give "
            "data.pages channels or first"
        )
    if (page or 0) >= len(images):
        raise ValueError(f"holds {counted(len(images), 'image')}, and has no page {page}")
    return images[page or 0]


def check_size(size: Size, max_pixels: int) -> None:
    """Refuse an image without pixels, or with too many.

    Raises:
        ValueError: with its size.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} pixels (height x width)")
    if height * width > max_pixels:
        raise ValueError(f"{height}x{width} = {height * width} pixels (height x width), more than the limit of {max_pixels}")
