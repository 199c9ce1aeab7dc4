"""Parts of TIFF files: the segments that a box touches, by tifffile. A tiled or mapped file is never read whole.

Sizes are (height, width). Boxes are (left, top, right, bottom) in whole pixels of a level.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree
from typing import Any, BinaryIO

import numpy as np

from simmim.data.deep import StoredValues
from simmim.data.file_checks import check_size, pick_image
from simmim.data.lengths import UM_PER
from simmim.data.orientation import ORIENTATION, ORIENTATIONS, Size, stored_box, swaps_axes, turn_array_upright
from simmim.data.tiff import channel_names, check_page, check_tags, divide_pages, import_tifffile, nodata_of, planes_of
from simmim.data.windows import WindowBox, WindowedImage

JPEG_CODES = (6, 7, 34892, 33007)  # compressions whose segments share tables
PIXEL_SCALE = 33550
GEO_TAGS = (PIXEL_SCALE, 33922, 34264, 34735, 34736, 34737)  # scale, tie points, transformation, keys and their values
X_RESOLUTION, RESOLUTION_UNIT = 282, 296
UM_PER_UNIT = {2: 25400.0, 3: 10000.0}  # inch, cm
SCREEN_DPI = (72, 96)  # what programs write that know no resolution
MPP = re.compile(r"\bMPP ?= ?([0-9.]+)")  # Aperio's µm per pixel


class TiffImage(WindowedImage):
    """An image of a TIFF file.

    Args:
        stream: stays open until `close`.
        pages: as of `Reading`.
        page: number of the image in a file of several.
        max_pixels: of a segment, which is decoded whole.

    Raises:
        ValueError: for pages that nothing explains, codecs that are not installed, and pixels in one large segment.
    """

    def __init__(self, stream: BinaryIO, pages: str | None, page: int | None, max_pixels: int) -> None:
        stream.seek(0)
        self.stream = stream
        self.tiff = import_tifffile().TiffFile(stream)
        check_tags(self.tiff)
        self.numbers = pick_image(divide_pages(self.tiff, pages), page)
        self.first = check_page(self.tiff)
        self.maps: dict[int, np.ndarray] = {}
        tag = self.first.tags.get(ORIENTATION)
        self.orientation = tag.value if tag and tag.value in ORIENTATIONS else 1
        series = self.tiff.series[0]
        is_series = series.keyframe.offset == self.first.offset
        self.series = [level for level in series.levels if len(level.pages) == len(series.pages)] if is_series else []
        sizes = [(level.keyframe.imagelength, level.keyframe.imagewidth) for level in self.series] or [
            (self.first.imagelength, self.first.imagewidth)
        ]
        self.levels = tuple(size[::-1] if swaps_axes(self.orientation) else size for size in sizes)  # type: ignore[misc]
        self.georeference = {tag.code: (tag.dtype, tag.count, tag.value) for tag in self.first.tags if tag.code in GEO_TAGS}
        self.pixel_size = pixel_size_of(self.tiff)
        self.nodata = nodata_of(self.first)
        for level in range(len(self.levels)):
            self.check_segments(level, max_pixels)
        self.read(len(self.levels) - 1, (0, 0, 1, 1))  # a codec that is not installed is told now

    def read(self, level: int, box: WindowBox) -> StoredValues:
        left, top, right, bottom = map(int, stored_box(box, self.levels[level], self.orientation))
        size: Size = (bottom - top, right - left)
        parts = [self.read_page(level, number, (left, top, right, bottom), size) for number in self.numbers]
        values = planes_of(self.first, parts)
        values = turn_array_upright(values, self.orientation)
        return StoredValues(values, self.nodata, channel_names(self.tiff, len(values)))

    def pages_of(self, level: int) -> list[Any]:
        """The pages of a level; one alone may stand for a stack."""
        return list(self.series[level].pages) if self.series else [self.first]

    def read_page(self, level: int, number: int, box: WindowBox, size: Size) -> np.ndarray:
        """A part of a page in the order of its axes."""
        pages = self.pages_of(level)
        if number >= len(pages):
            return cut_axes(pages[0].axes, self.mapped_stack(level, pages[0])[number], box)
        page = pages[number]
        if (mapped := self.mapped_page(page)) is not None:
            return cut_axes(page.keyframe.axes, mapped, box)
        return self.decode_segments(page, box, size)

    def mapped_page(self, page: Any) -> np.ndarray | None:
        """A page whose values lie in the file as in memory; None for others."""
        keyframe = page.keyframe
        if not (keyframe.is_final and self.tiff.filehandle.is_file and page.dataoffsets[0] % keyframe.dtype.itemsize == 0):
            return None
        if page.offset not in self.maps:
            dtype = self.tiff.byteorder + keyframe.dtype.char
            shape = keyframe.shape
            if page.dataoffsets[0] + math.prod(shape) * keyframe.dtype.itemsize > self.tiff.filehandle.size:
                raise ValueError("cut short: it ends before its pixels")
            self.maps[page.offset] = np.memmap(
                self.tiff.filehandle.path, dtype, "r", offset=page.dataoffsets[0], shape=tuple(shape)
            )
        return self.maps[page.offset]

    def mapped_stack(self, level: int, page: Any) -> np.ndarray:
        """Pages that the first one describes, as ImageJ writes large stacks: in one piece.

        Raises:
            ValueError: when they are not in one piece.
        """
        series = self.series[level]
        if series.dataoffset is None or not self.tiff.filehandle.is_file:
            raise ValueError("its pages are not in one piece, and only the first is described")
        dtype = self.tiff.byteorder + series.dtype.char
        shape = (math.prod(series.shape) // math.prod(page.shape), *page.shape)
        return np.memmap(self.tiff.filehandle.path, dtype, "r", offset=series.dataoffset, shape=shape)

    def decode_segments(self, page: Any, box: WindowBox, size: Size) -> np.ndarray:
        """The segments of a page that a box touches, pasted together."""
        keyframe, (left, top, right, bottom) = page.keyframe, box
        separate, _, length, width, samples = keyframe.shaped
        values = np.full((separate, *size, samples), keyframe.nodata, keyframe.dtype)
        tall, wide = segment_size(keyframe)
        across, down = math.ceil(width / wide), math.ceil(length / tall)
        options: dict[str, Any] = {"_fullsize": keyframe.is_tiled}
        if keyframe.compression in JPEG_CODES:
            options |= {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader}
        file = self.tiff.filehandle
        for plane in range(separate):
            for row in range(top // tall, math.ceil(bottom / tall)):
                for column in range(left // wide, math.ceil(right / wide)):
                    index = (plane * down + row) * across + column
                    count = page.databytecounts[index]
                    if not count:
                        continue
                    file.seek(page.dataoffsets[index])
                    data = file.read(count)
                    if len(data) < count:
                        raise ValueError("cut short: it ends before its pixels")
                    segment, _, _ = keyframe.decode(data, index, **options)
                    if segment is not None:
                        paste(values[plane], segment[0], (row * tall - top, column * wide - left))
        return {"YX": values[0, ..., 0], "YXS": values[0], "SYX": values[..., 0]}[keyframe.axes]

    def check_segments(self, level: int, max_pixels: int) -> None:
        """Refuse pages whose pixels are compressed in pieces that are too large.

        Raises:
            ValueError: with the piece's size.
        """
        page = self.pages_of(level)[0].keyframe
        if page.imagedepth > 1 or getattr(page, "tiledepth", 1) > 1:
            raise ValueError("a TIFF page of several depths, expected a picture")
        if page.is_final and self.tiff.filehandle.is_file:
            return
        try:
            check_size(segment_size(page), max_pixels)
        except ValueError as error:
            raise ValueError(f"its pixels are in pieces of {error}: write it in tiles") from error

    def close(self) -> None:
        self.maps.clear()
        self.tiff.close()
        self.stream.close()


def segment_size(page: Any) -> Size:
    """(height, width) of a tile or strip."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip or page.imagelength, page.imagelength), page.imagewidth


def paste(values: np.ndarray, segment: np.ndarray, corner: tuple[int, int]) -> None:
    """Copy what of a segment lies inside.

    Args:
        values: (height, width, samples).
        segment: (height, width, samples).
        corner: its (top, left) in `values`, which may be outside.
    """
    top, left = corner
    rows = slice(max(top, 0), min(top + segment.shape[0], values.shape[0]))
    columns = slice(max(left, 0), min(left + segment.shape[1], values.shape[1]))
    values[rows, columns] = segment[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def cut_axes(axes: str, values: np.ndarray, box: WindowBox) -> np.ndarray:
    """A part of an array with axes YX, YXS or SYX, in memory and of the machine's byte order."""
    left, top, right, bottom = box
    part = values[:, top:bottom, left:right] if axes == "SYX" else values[top:bottom, left:right]
    return np.array(part, part.dtype.newbyteorder("="))


def pixel_size_of(tiff: Any) -> float | None:
    """The length of a pixel: µm of OME, Aperio, ImageJ and the resolution; a map's unit of GeoTIFF. None where it is not
    told."""
    page = tiff.pages.first
    if scale := page.tags.get(PIXEL_SCALE):
        return float(scale.value[0])
    for found in (_ome_size(tiff), _aperio_size(page), _resolution(tiff, page)):
        if found:
            return found
    return None


def _ome_size(tiff: Any) -> float | None:
    try:
        root = xml.etree.ElementTree.fromstring(tiff.ome_metadata or "<OME/>")
    except xml.etree.ElementTree.ParseError:
        return None
    pixels = root.find(".//{*}Pixels")
    if pixels is None or not pixels.get("PhysicalSizeX"):
        return None
    return float(pixels.get("PhysicalSizeX", 0)) * UM_PER.get(pixels.get("PhysicalSizeXUnit", "µm"), 1.0)


def _aperio_size(page: Any) -> float | None:
    found = MPP.search(page.description or "")
    return float(found[1]) if found else None


def _resolution(tiff: Any, page: Any) -> float | None:
    tag, unit = page.tags.get(X_RESOLUTION), page.tags.get(RESOLUTION_UNIT)
    if tag is None or not tag.value[0]:
        return None
    per_unit = tag.value[0] / tag.value[1]
    if tiff.is_imagej:
        named = UM_PER.get(str((tiff.imagej_metadata or {}).get("unit", "")))
        return named / per_unit if named else None
    number = int(unit.value) if unit else 1
    if number not in UM_PER_UNIT or (number == 2 and per_unit in SCREEN_DPI):
        return None
    return UM_PER_UNIT[number] / per_unit
