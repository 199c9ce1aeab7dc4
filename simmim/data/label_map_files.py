"""Values of label maps as they are stored: of a PNG with a palette the indices, never the colors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from simmim.data.addresses import parse_address
from simmim.data.decode import STRETCHED, open_picture
from simmim.data.file_formats import NUMPY_MAGIC
from simmim.data.known_formats import detect_path
from simmim.data.loading import available_cores
from simmim.data.orientation import Size, read_orientation, turn_upright, upright_size
from simmim.data.pillow_guard import UNREADABLE, decoding, describe_error
from simmim.data.records import Record, open_record, record_name
from simmim.reading import Reading

if TYPE_CHECKING:
    import datasets

ROWS_AT_ONCE = 256
NUM_VALUES = 2**16  # values are below
LABEL_MAP_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM", "JPEG")
HEADER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")  # whose size Pillow tells from the header


@dataclass(frozen=True)
class SceneStatistics:
    """What is known of one scene after its label map was read.

    Attributes:
        name: the label map's file, or its row.
        size: (height, width) of the image, upright; None if the image cannot be read.
        counts: number of pixels of each value in the file.
    """

    name: str
    size: Size | None
    counts: dict[int, int]


def inspect_scenes(
    scenes: datasets.Dataset, progress: Callable[[Iterable], Iterable] = iter, reading: Reading = STRETCHED
) -> list[SceneStatistics]:
    """Read every label map of rows with columns `image` and `label_map`.

    Args:
        reading: which pages or files make an image.

    Raises:
        ValueError: naming the file, for a label map that cannot be read or is not of its image's size.
    """

    def batches() -> Iterator[list[tuple]]:
        for first in range(0, len(scenes), ROWS_AT_ONCE):
            rows = scenes[first : first + ROWS_AT_ONCE]
            yield [(first + offset, *pair) for offset, pair in enumerate(zip(rows["image"], rows["label_map"]))]

    inspect = functools.partial(inspect_scene, reading=reading)
    with ThreadPoolExecutor(available_cores()) as pool:
        results = (pool.map(lambda scene: inspect(*scene), batch) for batch in batches())
        return list(progress(itertools.chain.from_iterable(results)))


def inspect_scene(row: int, image: Record, label_map: Record, reading: Reading = STRETCHED) -> SceneStatistics:
    """Read one label map, as `inspect_scenes` does."""
    name, image_name = record_name(label_map, row), record_name(image, row)
    try:
        values = read_label_map(label_map)
        if reading.pages != "first":
            check_single_page(label_map)
    except UNREADABLE as error:
        raise ValueError(f"label map {name} cannot be read: {describe_error(error)}") from error
    try:
        size = read_size(image, reading)
    except UNREADABLE:
        size = None  # training replaces and counts an image that cannot be read
    if size is not None and size != values.shape:
        raise ValueError(
            f"label map {name} is {values.shape[0]}x{values.shape[1]} pixels and its image {image_name} {size[0]}x{size[1]} "
            "(height x width): give label maps of their images' sizes, upright"
        )
    counts = np.bincount(values.ravel())
    return SceneStatistics(name, size, {int(value): int(counts[value]) for value in np.flatnonzero(counts)})


def read_label_map(record: Record) -> np.ndarray:
    """The values of one record's label map as they are stored: (height, width) uint8, or int32 if they are deeper.

    Raises:
        One of `UNREADABLE` if the file is broken or missing, holds colors or anything but whole numbers from 0 to 65,535, or
        is a JPEG, whose values are not exact.
    """
    with decoding(), open_record(record) as stream:
        is_array = stream.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC
        stream.seek(0)
        if is_array:
            values = np.load(stream, allow_pickle=False)
        else:
            image = Image.open(stream, formats=LABEL_MAP_FORMATS)
            page = parse_address(record["path"] or "").page
            if page is not None:
                seek_page(image, page)
            values = stored_values(image)
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise ValueError(f"holds {values.dtype} values of shape {values.shape}, expected whole numbers (height, width)")
    if values.dtype in (bool, np.uint8):
        return values.astype(np.uint8)
    if values.size and not 0 <= values.min() <= values.max() < NUM_VALUES:
        raise ValueError(f"holds values from {values.min()} to {values.max()}, expected 0 to {NUM_VALUES - 1}")
    return values.astype(np.int32)


def check_single_page(record: Record) -> None:
    """Check that a TIFF file on disk of which no page is named has one page, pyramids apart.

    Raises:
        ValueError: for several pages of one size, of which it is unclear which is meant.
    """
    path = record["path"] or ""
    if record["bytes"] is not None or not path.lower().endswith((".tif", ".tiff")):
        return
    with decoding(), open_record(record) as stream, Image.open(stream, formats=("TIFF",)) as image:
        count, size = getattr(image, "n_frames", 1), image.size
        if count > 1:
            image.seek(1)
        if count > 1 and image.size == size:
            raise ValueError(
                f"holds {count} pages for one image: give one page, or data.pages images where each is an image"
            )


def seek_page(image: Image.Image, page: int) -> None:
    """Go to a page, from 0.

    Raises:
        ValueError: where there is none.
    """
    try:
        image.seek(page)
    except EOFError:
        raise ValueError(f"has no page {page}, counted from 0") from None


def stored_values(image: Image.Image) -> np.ndarray:
    """The pixels of an opened image, upright, without any conversion.

    Raises:
        ValueError: for colors and for JPEG.
    """
    if image.format in ("JPEG", "MPO"):
        raise ValueError("a JPEG, whose values are not exact: give PNG")
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise ValueError(f"holds colors (mode {image.mode}), expected one number per pixel: give a grayscale or palette PNG")
    # Pillow stretches gray values of 2 and 4 bits to the range from 0 to 255.
    stretch = {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1) if image.format == "PNG" and image.tile else 1  # type: ignore[attr-defined]
    image.load()
    return np.asarray(turn_upright(image, read_orientation(image))) // (1 if image.mode == "1" else stretch)


def read_size(record: Record, reading: Reading = STRETCHED) -> Size:
    """(height, width) of an image, upright; from its header if possible.

    Args:
        reading: which pages or files make an image.

    Raises:
        One of `UNREADABLE`.
    """
    with decoding():
        if detect_path(record):
            return open_picture(record, None, reading=Reading(pages=reading.pages)).size
        try:
            with open_record(record) as stream, Image.open(stream, formats=HEADER_FORMATS) as image:
                return upright_size(image, read_orientation(image))
        except UnidentifiedImageError:
            return open_picture(record, None, reading=Reading(pages=reading.pages)).size
