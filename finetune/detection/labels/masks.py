"""Masks as labels state them: COCO's polygons and run lengths, YOLO's polygons, to packed masks of upright images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmim.data.orientation import Box, Size, turn_array_upright
from simmim.finetune.detection.labels.base import RawScene
from simmim.finetune.detection.masks import PackedMask, draw, from_counts, pack
from simmim.messages import counted

MIN_POINTS = 3  # of a polygon


@dataclass(frozen=True, eq=False)
class PolygonInShares:
    """A polygon whose image's size is not known yet, as YOLO's text states it.

    Attributes:
        points: (N, 2) float64, x and y of each point in shares of width and height.
    """

    points: np.ndarray

    @property
    def box(self) -> Box:
        """Center, width and height of the box around it, in shares."""
        (left, top), (right, bottom) = self.points.min(axis=0).tolist(), self.points.max(axis=0).tolist()
        return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top

    def in_pixels(self, size: Size) -> list[float]:
        """As one of COCO's polygons, (x, y, x, y, …) in an image of `size`."""
        height, width = size
        return (self.points * (width, height)).ravel().tolist()


def states_mask(segmentation: Any) -> bool:
    """Whether an annotation has a mask; some tools write an empty list for a box alone."""
    return segmentation is not None and segmentation != [] and segmentation != {}


def read_mask(segmentation: Any, size: Size, place: str) -> PackedMask:
    """The mask of one object.

    Args:
        segmentation: a list of polygons, (x, y, x, y, …) each, whose union it is; run lengths, a dict with size and counts,
            a list or compressed to text; a polygon in shares; or a packed mask.
        size: of the picture that they refer to.
        place: file and annotation, for error messages.

    Raises:
        ValueError: for anything else, run lengths of another size or that do not fill it, and polygons of fewer than three
            points.
    """
    if isinstance(segmentation, PackedMask):
        return segmentation
    if isinstance(segmentation, PolygonInShares):
        segmentation = [segmentation.in_pixels(size)]
    if isinstance(segmentation, dict):
        return from_counts(run_lengths(segmentation, size, place), size)
    return from_polygons(segmentation, size, place)


def from_polygons(polygons: Any, size: Size, place: str) -> PackedMask:
    """The union of polygons, as COCO's own tools rasterize them."""
    from faster_coco_eval import mask as coco

    if not isinstance(polygons, list):
        raise ValueError(f"{place}: segmentation {str(polygons)[:40]!r}, expected polygons or run lengths as COCO's")
    parts = []
    for number, polygon in enumerate(polygons):
        if not isinstance(polygon, list) or not all(isinstance(value, (int, float)) for value in polygon):
            raise ValueError(f"{place}: polygon {number} is no list of numbers: give x, y, x, y, … in pixels")
        if len(polygon) % 2 or len(polygon) < 2 * MIN_POINTS:
            raise ValueError(
                f"{place}: polygon {number} has {len(polygon)} numbers, expected x and y of {MIN_POINTS} points or more: "
                "correct or remove it"
            )
        if not all(math.isfinite(value) for value in polygon):
            raise ValueError(f"{place}: polygon {number} has numbers that are not finite: correct or remove it")
        parts.append([float(value) for value in polygon])
    height, width = size
    merged = coco.merge(coco.frPyObjects(parts, height, width))
    return from_counts(decompress(merged["counts"], size), size)


def run_lengths(segmentation: dict[str, Any], size: Size, place: str) -> np.ndarray:
    """The run lengths of one mask, (N,) int64.

    Raises:
        ValueError: for those of another size, broken ones, and those that do not fill the size.
    """
    stated, counts = segmentation.get("size"), segmentation.get("counts")
    if counts is None or not isinstance(stated, (list, tuple)) or len(stated) != 2:
        raise ValueError(f"{place}: run lengths without size or counts: give both, as COCO's")
    if tuple(stated) != size:
        raise ValueError(
            f"{place}: run lengths of {stated[0]}x{stated[1]} pixels, and the image has {size[0]}x{size[1]} (height x "
            "width): were images resized after they were labeled?"
        )
    remedy = "correct or remove them"
    if isinstance(counts, (str, bytes)):
        try:
            values = decompress(counts, size)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{place}: broken run lengths ({str(error).rstrip('.')}): {remedy}") from error
    elif isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts):
        values = np.array(counts, dtype=np.int64)
    else:
        raise ValueError(f"{place}: run lengths are no whole numbers from 0: {remedy}")
    if values.sum() != size[0] * size[1] or (values < 0).any():
        raise ValueError(
            f"{place}: run lengths of {values.sum()} pixels, and the image has {size[0]} x {size[1]} = "
            f"{size[0] * size[1]}: {remedy}"
        )
    return values


def decompress(counts: str | bytes, size: Size) -> np.ndarray:
    """Run lengths from COCO's text.

    Raises:
        RuntimeError, ValueError: for a text that is none.
    """
    import faster_coco_eval.mask_api_new_cpp as coco

    [found] = coco.toUncompressedRLE([{"size": list(size), "counts": counts}])
    return np.array(found["counts"], dtype=np.int64)


def turn_mask(mask: PackedMask, stored: Size, orientation: int) -> PackedMask:
    """A mask of the stored picture, in the upright one."""
    return pack(turn_array_upright(draw(mask, stored)[None], orientation)[0])


def filled_box(box: Sequence[float], size: Size) -> PackedMask:
    """All pixels of a box, in an image of `size`."""
    pixels = np.zeros(size, dtype=bool)
    left, top, right, bottom = (round(value) for value in box)
    pixels[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return pack(pixels)


def fills_box(mask: PackedMask) -> bool:
    """Whether a mask is but a rectangle."""
    return bool(mask.pixels.all())


def learns_masks(parts: Sequence[Sequence[RawScene]], wanted: bool | None, path: str) -> bool:
    """Whether masks are read.

    Args:
        parts: scenes.
        wanted: the setting head.masks.

    Raises:
        ValueError: where they are wanted and not every object has one, or some have and some have not.
    """
    if wanted is False:
        return False
    objects = [found for scenes in parts for scene in scenes for found in scene.objects if not found.ignored]
    without = [found for found in objects if found.segmentation is None]
    if not without:
        return bool(objects)
    if len(without) < len(objects) or wanted:
        raise ValueError(
            f"{without[0].place} has no mask, as {len(without):,} of {counted(len(objects), 'object')} of {path!r}: give "
            "every object one, or learn boxes alone with head.masks false"
        )
    return False
