"""Masks as a detector predicts them: logits on a grid, which are read at the pixels of an image of any size.

Sizes are (height, width).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simmim.finetune.dense.windows import Size
from simmim.finetune.detection.masks import PackedMask, draw, pack
from simmim.finetune.detection.pyramid import Predictions

# Share of a box's sides by which its mask may reach over them, as boxes are found a little wrong. On 60 scenes of shapes
# that a model of ten scenes had not seen, the masks' AP was 67.5 % without, 67.4 at 0.05, 66.1 at 0.1, 65.8 at 0.2.
MARGIN = 0.05
MASKS_AT_ONCE = 2**21  # cells, for the memory of their maps


class SoftMask(NamedTuple):
    """The mask of one found object, around its box.

    Attributes:
        logits: (h, w) float32.
        corner: (y, x) of the upper left cell's corner, in pixels.
        cell: height and width of a cell, in pixels.
        limits: (top, left, bottom, right) in pixels, over which the mask does not reach.
    """

    logits: np.ndarray
    corner: tuple[float, float]
    cell: tuple[float, float]
    limits: tuple[float, float, float, float]

    def moved(self, corner: tuple[int, int]) -> SoftMask:
        """The mask of a tile whose upper left pixel is `corner`, (top, left), in the whole image."""
        (y, x), (top, left, bottom, right), (down, across) = self.corner, self.limits, corner
        limits = (top + down, left + across, bottom + down, right + across)
        return SoftMask(self.logits, (y + down, x + across), self.cell, limits)

    def scaled(self, down: float, across: float) -> SoftMask:
        """The mask in an image whose sides are multiplied."""
        (y, x), (height, width), (top, left, bottom, right) = self.corner, self.cell, self.limits
        limits = (top * down, left * across, bottom * down, right * across)
        return SoftMask(self.logits, (y * down, x * across), (height * down, width * across), limits)

    def packed(self, size: Size) -> PackedMask:
        """The pixels of an image of `size` at whose centers the logits, bilinear between those of cells, are positive."""
        (first_row, rows), (first_column, columns) = (
            pixels_between(
                max(self.corner[axis], self.limits[axis]),
                min(self.corner[axis] + self.cell[axis] * self.logits.shape[axis], self.limits[axis + 2]),
                size[axis],
            )
            for axis in (0, 1)
        )
        if not (len(rows) and len(columns)):
            return pack(np.zeros((0, 0), dtype=bool))
        values = self.logits
        for axis, centers in ((0, rows), (1, columns)):
            places = ((centers - self.corner[axis]) / self.cell[axis] - 0.5).clip(0, values.shape[axis] - 1)
            lower = np.floor(places).astype(np.intp)
            upper, share = np.minimum(lower + 1, values.shape[axis] - 1), (places - lower).astype(np.float32)
            share = share[:, None] if axis == 0 else share
            values = values.take(lower, axis) * (1 - share) + values.take(upper, axis) * share
        return pack(values > 0, (first_row, first_column))


def pixels_between(start: float, end: float, side: int) -> tuple[int, np.ndarray]:
    """The first pixel of a side whose center lies between two places, and the centers of all that do."""
    first = max(0, int(np.ceil(start - 0.5)))
    last = min(side, int(np.floor(end - 0.5)) + 1)
    return first, np.arange(first, max(first, last)) + 0.5


def predict_masks(predictions: Predictions, row: int, points: Tensor, boxes: Tensor) -> tuple[SoftMask, ...]:
    """The masks of the objects that some points of one image found.

    Args:
        row: of the image.
        points: (N,), their numbers.
        boxes: (N, 4) of the objects, in pixels.
    """
    stride, masks = predictions.mask_stride, []
    height, width = predictions.sizes[0]
    for first in range(0, len(points), max(1, MASKS_AT_ONCE // (height * width))):
        part = slice(first, first + max(1, MASKS_AT_ONCE // (height * width)))
        logits = predictions.mask_logits(row, points[part]).detach().cpu().numpy()
        for of_object, (x1, y1, x2, y2) in zip(logits, boxes[part].tolist()):
            down, across = MARGIN * (y2 - y1), MARGIN * (x2 - x1)
            limits = (y1 - down, x1 - across, y2 + down, x2 + across)
            top, bottom = cells_between(limits[0], limits[2], stride, height)
            left, right = cells_between(limits[1], limits[3], stride, width)
            part_of_map = of_object[top:bottom, left:right].copy()
            masks.append(SoftMask(part_of_map, (top * stride, left * stride), (stride, stride), limits))
    return tuple(masks)


def cells_between(low: float, high: float, stride: int, count: int) -> tuple[int, int]:
    """First and last cell, exclusive, whose centers surround all places between two, or as many as there are."""
    first = max(0, int((low - stride / 2) // stride))
    return first, max(first + 1, min(count, int(-(-(high + stride / 2) // stride))))


def draw_masks(masks: tuple[SoftMask, ...], size: Size) -> Tensor:
    """All masks in an image of `size`, (N, height, width) bool."""
    pixels = [draw(mask.packed(size), size) for mask in masks]
    return torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, *size, dtype=torch.bool)
