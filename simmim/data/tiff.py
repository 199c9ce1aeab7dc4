"""TIFF files through tifffile: which pages make an image, and their values.

OME, ImageJ and tifffile's own metadata tell the axes of a stack: C are channels, and along Z, T and others there are several
images. GDAL's bands are samples of one page.
"""

from __future__ import annotations

import contextlib
import math
import struct
import xml.etree.ElementTree
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from simmim.data.deep import StoredValues
from simmim.data.orientation import ORIENTATION, ORIENTATIONS, turn_array_upright
from simmim.data.pillow_guard import silence_logger
from simmim.messages import counted

GDAL_METADATA, GDAL_NODATA = 42112, 42113
# Size, type, compression, layout and places of the pixels.
PIXEL_TAGS = frozenset((256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 339))
UNKNOWN_AXES = frozenset("QI")  # tifffile's names of axes that no metadata explain
PLANE_AXES = frozenset("YXS")
RGB, WHITE_IS_ZERO = 2, 0


@contextlib.contextmanager
def open_tiff(stream: BinaryIO) -> Iterator[Any]:
    """A `tifffile.TiffFile` of a stream. What needs imagecodecs says so.

    Raises:
        ValueError: where the compression needs imagecodecs, which is not installed.
    """
    tifffile = import_tifffile()
    stream.seek(0)
    try:
        with tifffile.TiffFile(stream) as tiff:
            check_tags(tiff)
            yield tiff
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        raise ValueError(f"{error}: pip install 'simmim-toolkit[tiff]'") from error


def import_tifffile() -> Any:
    """The library, whose log is silent.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        import tifffile
    except ImportError:
        raise ValueError("needs tifffile: pip install tifffile") from None
    silence_logger("tifffile")
    return tifffile


def check_tags(tiff: Any) -> None:
    """Refuse a file that ends within the tags of its first page, or before their values: tifffile would take the defaults.

    Raises:
        ValueError: for such a file.
    """
    page, sizes = tiff.pages.first, tiff.tiff
    tiff.filehandle.seek(page.offset)
    (num_tags,) = struct.unpack(sizes.tagnoformat, tiff.filehandle.read(sizes.tagnosize))
    tags = tiff.filehandle.read(num_tags * sizes.tagsize)
    codes = {struct.unpack_from(sizes.byteorder + "H", tags, start)[0] for start in range(0, len(tags) - 1, sizes.tagsize)}
    missing = (codes & PIXEL_TAGS) - {tag.code for tag in page.tags}
    if len(tags) < num_tags * sizes.tagsize or missing:
        raise ValueError("cut short: tags of the first page, or their values, are missing")


class UnexplainedPages(ValueError):
    """A file whose metadata do not tell whether its pages are channels or images."""


def divide_pages(tiff: Any, pages: str | None) -> list[tuple[int, ...]]:
    """For each image of a file, the numbers of the pages of its first series that are its channels.

    Args:
        pages: channels, images or first, as of `Reading`; None goes by the file's metadata.

    Raises:
        UnexplainedPages: for several pages that nothing explains.
        ValueError: for pages that differ.
    """
    is_slide = tiff.is_svs or tiff.is_ndpi or tiff.is_scn or tiff.is_bif  # whose other series are label and overview
    if (
        pages == "first"
        or (pages is None and is_slide)
        or (len(tiff.pages) == 1 and not tiff.is_shaped and not tiff.is_imagej)
    ):
        return [(0,)]
    series = tiff.series[0]
    lengths = {axis: size for axis, size in zip(series.axes, series.shape) if axis not in PLANE_AXES and size > 1}
    others = [other for other in tiff.series[1:] if not getattr(other.pages[0], "is_reduced", False)]
    if others:
        raise ValueError("its pages differ in size or type: give data.pages first")
    count = math.prod(lengths.values())
    if count == 1:
        return [(0,)]
    numbers = np.arange(count).reshape(tuple(lengths.values()))
    if pages == "channels":
        numbers = numbers.reshape(1, -1)
    elif pages == "images":
        numbers = numbers.reshape(-1, 1)
    elif lengths.keys() & UNKNOWN_AXES:
        raise UnexplainedPages(
            f"holds {counted(count, 'page')} that nothing explains: give data.pages channels, images or first"
        )
    elif "C" in lengths:
        numbers = np.moveaxis(numbers, list(lengths).index("C"), -1).reshape(-1, lengths["C"])
    else:
        numbers = numbers.reshape(-1, 1)
    return [tuple(image) for image in numbers.tolist()]


def read_pages(tiff: Any, numbers: tuple[int, ...]) -> StoredValues:
    """Pages of the first series as the channels of an image, samples interleaved or in planes.

    Raises:
        ValueError: for a page that is no picture.
    """
    page = check_page(tiff)
    if numbers == (0,):
        stored = [page.asarray()]
    else:
        series = tiff.series[0]
        if len(series.pages) > max(numbers):
            stored = [series.pages[number].asarray() for number in numbers]
        else:  # one page describes all of them, as ImageJ writes large stacks
            stack = series.asarray().reshape(-1, *page.shape)
            stored = [stack[number] for number in numbers]
    values = planes_of(page, stored)
    tag = page.tags.get(ORIENTATION)
    values = turn_array_upright(values, tag.value if tag and tag.value in ORIENTATIONS else 1)
    return StoredValues(values, nodata_of(page), channel_names(tiff, len(values)))


def check_page(tiff: Any) -> Any:
    """The first page.

    Raises:
        ValueError: for a page that is no picture.
    """
    page = tiff.pages.first
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"a TIFF page with axes {page.axes}, expected a picture")
    return page


def planes_of(page: Any, stored: Sequence[np.ndarray]) -> np.ndarray:
    """Pages, or the same part of each, as the channels of an image as it is stored: (channels, height, width).

    Args:
        page: that describes them.
        stored: in the order of the page's axes.
    """
    planes = [
        {"YX": plane[None], "YXS": np.moveaxis(plane, -1, 0), "SYX": plane}[page.axes] for plane in map(np.asarray, stored)
    ]
    values = planes[0] if len(planes) == 1 else np.concatenate(planes)
    if page.photometric == WHITE_IS_ZERO:
        values = -values if values.dtype.kind == "f" else ~values
    elif page.photometric == RGB and len(values) == 4 and page.extrasamples and page.extrasamples[0] in (1, 2):
        values = over_white(values)
    return values


def over_white(values: np.ndarray) -> np.ndarray:
    """(bands and opacity, height, width) of an unsigned type, laid over white: without the opacity."""
    white = np.iinfo(values.dtype).max
    opacity = values[-1:] / np.float64(white)
    return (values[:-1] * opacity + white * (1 - opacity)).round().astype(values.dtype)


def nodata_of(page: Any) -> float | None:
    """The value that GDAL's tag names for no data."""
    tag = page.tags.get(GDAL_NODATA)
    try:
        value = float(str(tag.value).strip("\0 ")) if tag else math.nan
    except ValueError:
        return None
    return None if math.isnan(value) else value


def channel_names(tiff: Any, count: int) -> tuple[str, ...]:
    """The names of the channels where OME, ImageJ or GDAL name each of `count`; else none."""
    for names in (_ome_names, _imagej_names, _gdal_names):
        found = names(tiff)
        if len(found) == count and all(found):
            return tuple(found)
    return ()


def _ome_names(tiff: Any) -> list[str]:
    """The channels' names in OME-XML."""
    try:
        root = xml.etree.ElementTree.fromstring(tiff.ome_metadata or "<OME/>")
    except xml.etree.ElementTree.ParseError:
        return []
    pixels = root.find(".//{*}Pixels")
    return [channel.get("Name", "") for channel in pixels.findall("{*}Channel")] if pixels is not None else []


def _imagej_names(tiff: Any) -> list[str]:
    """The slices' labels of an ImageJ stack."""
    labels = (tiff.imagej_metadata or {}).get("Labels", [])
    return [str(label) for label in labels] if isinstance(labels, list | tuple) else []


def _gdal_names(tiff: Any) -> list[str]:
    """The bands' descriptions that GDAL wrote."""
    tag = tiff.pages.first.tags.get(GDAL_METADATA)
    try:
        root = xml.etree.ElementTree.fromstring(tag.value if tag else "<GDALMetadata/>")
    except xml.etree.ElementTree.ParseError:
        return []
    items = [item for item in root.findall("Item") if item.get("role") == "description"]
    return [item.text or "" for item in sorted(items, key=lambda item: int(item.get("sample", 0)))]
