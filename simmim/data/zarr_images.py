"""Images in Zarr folders, by the zarr library: the chunks that a box touches.

Sizes are (height, width). Boxes are (left, top, right, bottom) in whole pixels of a level.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from simmim.data.deep import StoredValues
from simmim.data.file_checks import pick_image
from simmim.data.windows import WindowBox, WindowedImage
from simmim.data.zarr_folders import NODE_FILES, read_layout, read_node
from simmim.messages import counted

PICTURE_AXES = "cyx"


class ZarrImage(WindowedImage):
    """An image of OME-Zarr, or a Zarr array.

    C are channels. Along T and Z each plane is a page, and pages are images by default. An array whose axes have no names
    is as one of `.npy`: two or three axes, of which channels are the first or, where that is no longer, the last.

    Args:
        folder: of the image.
        pages: as of `Reading`.
        page: number of the image in a folder of several.
        max_pixels: of a chunk, which is decoded whole.

    Raises:
        OSError: for folders that are missing.
        ValueError: for broken metadata, levels without chunks, values that are no real numbers, and chunks that are too
            large; where zarr is not installed.
    """

    def __init__(self, folder: str, pages: str | None, page: int | None, max_pixels: int) -> None:
        layout = read_layout(folder)
        self.arrays = [open_level(folder, level) for level in layout.levels]
        self.axes = layout.axes or plain_axes(self.arrays[0].shape)
        for array, name in zip(self.arrays, layout.levels):
            check_level(array, name, self.axes, max_pixels)
            check_chunks(os.path.join(folder, name))
        self.numbers = pick_image(divide_planes(self.lengths(0), pages), page)
        self.names = layout.names
        self.levels = tuple((self.length(level, "y"), self.length(level, "x")) for level in range(len(self.arrays)))
        self.pixel_size = layout.pixel_size

    def length(self, level: int, axis: str) -> int:
        """Of an axis of a level; 1 for one that there is not."""
        return int(self.arrays[level].shape[self.axes.index(axis)]) if axis in self.axes else 1

    def lengths(self, level: int) -> dict[str, int]:
        """Of the axes along which there are pages, in their order."""
        return {axis: self.length(level, axis) for axis in self.axes if axis not in PICTURE_AXES}

    def read(self, level: int, box: WindowBox) -> StoredValues:
        planes = [self.read_plane(level, number, box) for number in self.numbers]
        values = planes[0] if len(planes) == 1 else np.concatenate(planes)
        return StoredValues(values, names=self.names if len(self.names) == len(values) else ())

    def read_plane(self, level: int, number: int, box: WindowBox) -> np.ndarray:
        """A part of a page, (channels, height, width)."""
        left, top, right, bottom = box
        selected: dict[str, Any] = {"c": slice(None), "y": slice(top, bottom), "x": slice(left, right)}
        full = self.lengths(0)
        for axis, index in zip(full, np.unravel_index(number, tuple(full.values())) if full else ()):
            # A level may have fewer planes along Z: the one that lies there.
            selected[axis] = int(index) * self.length(level, axis) // full[axis]
        values = np.asarray(self.arrays[level][tuple(selected[axis] for axis in self.axes)])
        kept = [axis for axis in self.axes if axis in PICTURE_AXES]
        values = values.transpose([kept.index(axis) for axis in PICTURE_AXES if axis in kept])
        return (values if "c" in kept else values[None]).astype(values.dtype.newbyteorder("="), copy=False)


def import_zarr() -> Any:
    """The library.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        import zarr
    except ImportError:
        raise ValueError("a Zarr folder: pip install 'simmim-toolkit[zarr]', of Python 3.11 or later") from None
    return zarr


def count_pages(folder: str, pages: str | None) -> int:
    """How many images a folder holds.

    Raises:
        Exception: as of `ZarrImage`.
    """
    layout = read_layout(folder)
    name = layout.levels[0]
    array = open_level(folder, name)
    axes = layout.axes or plain_axes(array.shape)
    check_axes(array, name, axes)
    return len(divide_planes({axis: size for axis, size in zip(axes, array.shape) if axis not in PICTURE_AXES}, pages))


def divide_planes(lengths: dict[str, int], pages: str | None) -> list[tuple[int, ...]]:
    """For each image of a folder, the numbers of the pages whose channels are its.

    Args:
        lengths: of the axes along which there are pages.
        pages: channels, images or first, as of `Reading`; None is images.
    """
    count = math.prod(lengths.values())
    if pages == "first":
        return [(0,)]
    return [tuple(range(count))] if pages == "channels" else [(number,) for number in range(count)]


def open_level(folder: str, name: str) -> Any:
    """An array of a store.

    Raises:
        ValueError: for one that is not there.
    """
    path = os.path.join(folder, name) if name else folder
    node = read_node(path)
    if node is None or not node.is_array:
        raise ValueError(f"its level {name!r} is missing: no Zarr array is at {path}")
    return import_zarr().open_array(path, mode="r")


def plain_axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The axes of an array that does not name them, as of `.npy` files.

    Raises:
        ValueError: for other than two or three.
    """
    if len(shape) not in (2, 3):
        shown = counted(len(shape), "dimension")
        raise ValueError(f"a Zarr array of {shown} without names, expected 2 or 3, or dimension_names of t, c, z, y, x")
    return tuple("yx" if len(shape) == 2 else "yxc" if shape[2] <= shape[0] else "cyx")


def check_axes(array: Any, name: str, axes: tuple[str, ...]) -> None:
    """Check that an array has the axes of its image.

    Raises:
        ValueError: naming it.
    """
    if len(array.shape) != len(axes):
        raise ValueError(
            f"its level {name!r} has {counted(len(array.shape), 'dimension')}, and its axes are {', '.join(axes)}"
        )


def check_level(array: Any, name: str, axes: tuple[str, ...], max_pixels: int) -> None:
    """Refuse an array that holds no pictures, or chunks that are too large.

    Raises:
        ValueError: naming it.
    """
    check_axes(array, name, axes)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"holds {array.dtype} values, not real numbers")
    if not all(array.shape):
        raise ValueError(f"its level {name!r} is of shape {'x'.join(map(str, array.shape))}")
    chunk = [min(lengths) for lengths in zip(array.chunks, array.shape)]
    if math.prod(chunk) > max_pixels:
        shown = f"{'x'.join(map(str, chunk))} = {math.prod(chunk)} values"
        raise ValueError(f"its values are in chunks of {shown}, more than the limit of {max_pixels}: write smaller ones")


def check_chunks(folder: str) -> None:
    """Refuse an array none of whose chunks is there: the library would give the fill value.

    Raises:
        ValueError: naming it.
    """
    for _, _, files in os.walk(folder):
        if any(name not in NODE_FILES for name in files):
            return
    raise ValueError(f"none of the chunks of {folder} is there: it holds nothing, or its files are missing")
