"""Masks of objects: packed bits of the part of an image that holds one, and COCO's run lengths.

Sizes are (height, width). A mask is bool, True = belongs to the object.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from simmim.data.orientation import Size
from simmim.finetune.dense.views import nearest_pixels


class PackedMask(NamedTuple):
    """The mask of one object: a byte holds eight pixels of the smallest part of the image that shows it.

    Attributes:
        top, left: first row and column of the part.
        height, width: of the part; 0 for an object without a pixel.
        bits: of the part, row by row.
    """

    top: int
    left: int
    height: int
    width: int
    bits: bytes

    @property
    def pixels(self) -> np.ndarray:
        """The part, (height, width) bool."""
        count = self.height * self.width
        bits = np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=count)
        return bits.reshape(self.height, self.width).view(bool)

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(self.pixels.sum())

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) in pixels, exclusive."""
        return float(self.left), float(self.top), float(self.left + self.width), float(self.top + self.height)


def pack(pixels: np.ndarray, corner: tuple[int, int] = (0, 0)) -> PackedMask:
    """A mask from the pixels of a part of an image.

    Args:
        pixels: (height, width), of any type, 0 = not the object.
        corner: (top, left) of the part.
    """
    rows, columns = (np.flatnonzero(pixels.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return PackedMask(0, 0, 0, 0, b"")
    (first_row, last_row), (first_column, last_column) = ((found[0], found[-1] + 1) for found in (rows, columns))
    part = np.ascontiguousarray(pixels[first_row:last_row, first_column:last_column]).astype(bool)
    top, left = corner[0] + int(first_row), corner[1] + int(first_column)
    height, width = part.shape
    return PackedMask(top, left, height, width, np.packbits(part).tobytes())


def draw(mask: PackedMask, size: Size) -> np.ndarray:
    """The mask in its image, (height, width) bool."""
    pixels = np.zeros(size, dtype=bool)
    pixels[mask.top : mask.top + mask.height, mask.left : mask.left + mask.width] = mask.pixels
    return pixels


def sample(mask: PackedMask, rows: np.ndarray, columns: np.ndarray, stride: int = 1) -> np.ndarray:
    """How much of each cell of a view a mask covers, 0 to 255, uint8 of (ceil(H / stride), ceil(W / stride)).

    Args:
        rows, columns: (H,) and (W,), the pixel of the image that each row and column of the view shows; −1 for none. Both
            rise or fall.
        stride: side of a cell, in pixels of the view.
    """
    coverage = np.zeros((-(-len(rows) // stride), -(-len(columns) // stride)), dtype=np.uint8)
    shown_rows = np.flatnonzero((rows >= mask.top) & (rows < mask.top + mask.height))
    shown_columns = np.flatnonzero((columns >= mask.left) & (columns < mask.left + mask.width))
    if not (len(shown_rows) and len(shown_columns)):
        return coverage
    # Only the cells around the object are looked at.
    first = shown_rows[0] // stride, shown_columns[0] // stride
    count = shown_rows[-1] // stride + 1 - first[0], shown_columns[-1] // stride + 1 - first[1]
    pixels = np.zeros((count[0] * stride, count[1] * stride), dtype=bool)
    shown = mask.pixels[np.ix_(rows[shown_rows] - mask.top, columns[shown_columns] - mask.left)]
    pixels[np.ix_(shown_rows - first[0] * stride, shown_columns - first[1] * stride)] = shown
    covered = pixels.reshape(count[0], stride, count[1], stride).sum(axis=(1, 3))
    coverage[first[0] : first[0] + count[0], first[1] : first[1] + count[1]] = covered * 255 // stride**2
    return coverage


def resized(mask: PackedMask, size: Size, scaled: Size) -> PackedMask:
    """The mask of an image of `size`, in the image resized to `scaled`: each pixel is the one nearest to its center."""
    rows, columns = (nearest_pixels(side, 0, own, side) for own, side in zip(size, scaled))
    return pack(sample(mask, rows, columns))


# --- COCO's run lengths ------------------------------------------------------------------------------------------------


def from_counts(counts: np.ndarray, size: Size) -> PackedMask:
    """A mask from COCO's run lengths: of zeros and ones in turn, zeros first, column by column.

    Args:
        counts: not negative; their sum is the number of pixels.
        size: of the image.
    """
    height, _ = size
    ends = counts.cumsum()
    first, last = ends[0:-1:2], ends[1::2]  # of each run of ones, the latter exclusive
    first, last = first[last > first], last[last > first]
    if not len(first):
        return PackedMask(0, 0, 0, 0, b"")
    left, right = int(first[0] // height), int((last[-1] - 1) // height + 1)
    steps = np.zeros((right - left) * height + 1, dtype=np.int8)
    np.add.at(steps, first - left * height, 1)
    np.add.at(steps, last - left * height, -1)
    return pack(steps[:-1].cumsum(dtype=np.int8).reshape(right - left, height).T, (0, left))


def coco_rle(mask: PackedMask, size: Size) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths, as `json` writes them.

    Args:
        size: of the image.
    """
    from faster_coco_eval import mask as coco

    height, width = size
    # A row of zeros below ends every run at the bottom of the part, unless that is the bottom of the image.
    pixels = np.zeros((mask.height + (mask.height < height), mask.width), dtype=np.int8)
    pixels[: mask.height] = mask.pixels
    steps = np.diff(np.concatenate([[0], pixels.T.ravel(), [0]]))
    ends = []
    for positions in (np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)):
        columns, rows = np.divmod(positions, max(1, len(pixels)))
        ends.append((mask.left + columns) * height + mask.top + rows)
    edges = np.stack(ends, axis=1).ravel() if len(ends[0]) else np.zeros(0, dtype=np.int64)
    # As COCO's own tools, without an empty run at the end.
    ends_of_runs = edges if len(edges) and edges[-1] == height * width else [*edges, height * width]
    counts = np.diff(np.concatenate([[0], ends_of_runs]))
    found = coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    counts_text = found["counts"]
    return {
        "size": [height, width],
        "counts": counts_text.decode("ascii") if isinstance(counts_text, bytes) else counts_text,
    }
