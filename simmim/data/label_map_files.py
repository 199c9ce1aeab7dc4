"""What masks hold: the numbers in their files as they are stored, of a palette's PNG the indices, never the colors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from simmim.data.decode import open_picture
from simmim.data.orientation import Size, read_orientation, turn_upright, upright_size
from simmim.data.pillow_guard import UNREADABLE, decoding, describe_error
from simmim.data.records import open_record
from simmim.data.samples import available_cores

if TYPE_CHECKING:
    import datasets

ROWS_AT_ONCE = 256
VALUES = 2**16  # mask values are below
MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM", "JPEG")
HEADER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")  # of others `open_picture` tells the size


@dataclass(frozen=True)
class Scene:
    """What a look into one mask tells.

    Attributes:
        name: the mask's file, or its row.
        size: (height, width) of the image, upright; None where it cannot be read.
        counts: pixels of each value in the file.
    """

    name: str
    size: Size | None
    counts: dict[int, int]


def inspect_scenes(data: datasets.Dataset, progress: Callable[[Iterable], Iterable] = iter) -> list[Scene]:
    """Every mask of the rows `image`, `mask`.

    Raises:
        ValueError: naming the file, for a mask that cannot be read or is not of its image's size.
    """

    def records() -> Iterator[tuple]:
        for first in range(0, len(data), ROWS_AT_ONCE):
            rows = data[first : first + ROWS_AT_ONCE]
            yield [(first + offset, *pair) for offset, pair in enumerate(zip(rows["image"], rows["label_map"]))]

    with ThreadPoolExecutor(available_cores()) as pool:
        found = itertools.chain.from_iterable(pool.map(lambda row: inspect_scene(*row), some) for some in records())
        return list(progress(found))


def inspect_scene(row: int, image: dict, mask: dict) -> Scene:
    """One scene, as `inspect_scenes`."""
    name, image_name = (record["path"] or f"row {row}" for record in (mask, image))
    try:
        values = read_label_map(mask)
    except UNREADABLE as error:
        raise ValueError(f"mask {name} cannot be read: {describe_error(error)}") from error
    try:
        size = read_size(image)
    except UNREADABLE:
        size = None  # an image that cannot be read is replaced and counted when its turn comes
    if size is not None and size != values.shape:
        raise ValueError(
            f"label map {name} is {values.shape[0]}x{values.shape[1]} pixels and its image {image_name} {size[0]}x{size[1]} "
            "(height x width): give label maps of their images' sizes, upright"
        )
    counts = np.bincount(values.ravel())
    return Scene(name, size, {int(value): int(counts[value]) for value in np.flatnonzero(counts)})


def read_label_map(record: dict) -> np.ndarray:
    """The values of one row's mask, `{"bytes": …, "path": …}`, as they are stored: (height, width) uint8, or int32 where
    they are deeper.

    Raises:
        One of `UNREADABLE` when the file is broken or missing, holds colors or no whole numbers from 0 to 65,535, or is a
        JPEG, whose values are not exact.
    """
    with decoding():
        with open_record(record) as stream:
            if stream.read(6) == b"\x93NUMPY":
                stream.seek(0)
                values = np.load(stream, allow_pickle=False)
            else:
                stream.seek(0)
                values = stored_values(Image.open(stream, formats=MASK_FORMATS))
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise ValueError(f"holds {values.dtype} values of shape {values.shape}, expected whole numbers (height, width)")
    if values.dtype in (bool, np.uint8):
        return values.astype(np.uint8)
    if values.size and not 0 <= values.min() <= values.max() < VALUES:
        raise ValueError(f"holds values from {values.min()} to {values.max()}, expected 0 to {VALUES - 1}")
    return values.astype(np.int32)


def stored_values(image: Image.Image) -> np.ndarray:
    """The pixels of an opened image, upright, without any conversion.

    Raises:
        ValueError: for colors and for JPEG.
    """
    if image.format in ("JPEG", "MPO"):
        raise ValueError("a JPEG, whose values are not exact: give PNG")
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise ValueError(f"holds colors (mode {image.mode}), expected one number a pixel: give a grayscale or palette PNG")
    # Pillow stretches gray values of 2 and 4 bits over 0 to 255.
    stretched = {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1) if image.format == "PNG" and image.tile else 1
    image.load()
    return np.asarray(turn_upright(image, read_orientation(image))) // (1 if image.mode == "1" else stretched)


def read_size(record: dict) -> Size:
    """(height, width) of an image, from its header where that tells.

    Raises:
        One of `UNREADABLE`.
    """
    with decoding():
        try:
            with open_record(record) as stream, Image.open(stream, formats=HEADER_FORMATS) as image:
                return upright_size(image, read_orientation(image))
        except UnidentifiedImageError:
            return open_picture(record, None).size
