"""HEIC files through pillow-heif: upright, in 8 bits."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL import Image

from simmim.data.deep import StoredValues
from simmim.data.file_checks import check_size
from simmim.data.file_formats import FileFormat
from simmim.data.pixel_values import to_gray_or_rgb
from simmim.data.records import Record
from simmim.reading import Reading

BRANDS = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")


class HeifFormat(FileFormat):
    """HEIC files, as phones write them: the main image, turned upright, transparency laid over white."""

    name = "HEIC"

    def detect(self, head: bytes) -> bool:
        return head[4:12] in BRANDS

    def read(self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int) -> StoredValues:
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("HEIC image: pip install 'simmim-toolkit[heif]', or convert it to JPEG or PNG") from None
        stream.seek(0)
        opened = pillow_heif.open_heif(stream)  # the header; pixels are decoded when they are asked for
        check_size(opened.size[::-1], max_pixels)
        image = to_gray_or_rgb(Image.fromarray(np.asarray(opened)))
        levels = np.asarray(image)
        return StoredValues(levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1))
