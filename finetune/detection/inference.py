"""From predictions of points to boxes, and images of any size: whole, or tile by tile with the tiles' boxes merged.

Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from simmim.finetune.dense.windows import OVERLAP, Size, pad_to, passes_whole, windows_of
from simmim.finetune.detection.boxes import suppress
from simmim.finetune.detection.pyramid import Predictions

MIN_PROBABILITY = 0.01  # of a class, below which a box is not kept
MAX_OVERLAP = 0.6  # of two boxes of one class, as in ATSS
MAX_CANDIDATES = 1000  # of a level before suppression, as published
MAX_BOXES = 100  # of an image, as many as COCO's rules look at
EDGE_PX = 1.5  # a box that ends nearer to a tile's inner edge is taken to be cut there


class Found(NamedTuple):
    """The boxes found in one image, by falling score.

    Attributes:
        boxes: (N, 4) float32, (x1, y1, x2, y2) in pixels, inside the image.
        scores: (N,) float32, in [0, 1].
        classes: (N,) int64.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def at(self, size: Size, own: Size) -> Found:
        """The same boxes in the image at its own size, and on the CPU.

        Args:
            size: of the image in which they were found.
        """
        across, down = own[1] / size[1], own[0] / size[0]
        boxes = self.boxes.cpu() * torch.tensor([across, down, across, down])
        return Found(boxes, self.scores.cpu(), self.classes.cpu())


def find_boxes(
    model: Callable[[Tensor], Predictions],
    images: Tensor,
    window: Size,
    inference: str = "auto",
    max_boxes: int = MAX_BOXES,
) -> list[Found]:
    """The boxes in each of B images.

    Args:
        images: (B, channels, height, width) normalized.
        window: size of the images in training. Smaller images are padded to it, as in training.
        inference: whole; tiles, of the window's size, which overlap by a third or more; or auto: whole up to four windows.
        max_boxes: of one image.
    """
    if inference == "auto":
        inference = "whole" if passes_whole(images, window) else "tiles"
    size = (images.shape[2], images.shape[3])
    padded = pad_to(images, window)
    if inference == "whole":
        return [limit(suppressed(one), max_boxes) for one in candidates(model(padded), size)]
    return in_tiles(model, padded, size, window, max_boxes)


def in_tiles(
    model: Callable[[Tensor], Predictions], images: Tensor, size: Size, window: Size, max_boxes: int
) -> list[Found]:
    """As `find_boxes`, tile by tile. A box that a tile's edge cuts is left out if the object is small enough to be whole in
    a neighboring tile.

    Args:
        images: padded, not smaller than the window.
        size: of the images without their padding.
    """
    merged: list[list[Found]] = [[] for _ in images]
    for group, views in windows_of(images, window):
        for number, one in enumerate(candidates(model(views), window)):
            (top, left), row = group[number // len(images)], number % len(images)
            one = suppressed(one)
            one = take(one, ~is_cut(one.boxes, (top, left), window, size))
            moved = one.boxes + one.boxes.new_tensor([left, top, left, top])
            merged[row].append(clip_found(one._replace(boxes=moved), size))
    return [limit(suppressed(concatenate(parts)), max_boxes) for parts in merged]


def is_cut(boxes: Tensor, corner: tuple[int, int], window: Size, size: Size) -> Tensor:
    """Whether each box ends at an edge of its tile that is no edge of the image, and is short enough along that axis to be
    whole in the next tile; (N,) bool.

    Args:
        boxes: in the tile's pixels.
        corner: (top, left) of the tile.
    """
    cut = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for axis, low, high in ((0, 1, 3), (1, 0, 2)):
        at_low = (boxes[:, low] < EDGE_PX) & (corner[axis] > 0)
        at_high = (boxes[:, high] > window[axis] - EDGE_PX) & (corner[axis] + window[axis] < size[axis])
        short = boxes[:, high] - boxes[:, low] < OVERLAP * window[axis] - EDGE_PX
        cut |= (at_low | at_high) & short
    return cut


def candidates(predictions: Predictions, size: Size) -> list[Found]:
    """Boxes of each image before suppression, clipped to `size`: of each level the best by class probability; their score is
    the geometric mean of class probability and centerness, as in FCOS's implementation.

    Args:
        size: of the image without its padding.
    """
    probabilities, centerness = predictions.logits.sigmoid(), predictions.centerness.sigmoid()
    boxes = predictions.boxes()
    results = []
    for row in range(len(probabilities)):
        parts, first = [], 0
        for height, width in predictions.sizes:
            level = slice(first, first + height * width)
            first += height * width
            of_level = probabilities[row, level]
            scores, order = of_level.flatten().topk(min(MAX_CANDIDATES, of_level.numel()))
            order = order[scores > MIN_PROBABILITY]
            points, classes = order // of_level.shape[1], order % of_level.shape[1]
            score = (of_level[points, classes] * centerness[row, level][points]).sqrt()
            parts.append(Found(boxes[row, level][points], score, classes))
        results.append(clip_found(concatenate(parts), size))
    return results


def clip_found(found: Found, size: Size) -> Found:
    """Boxes clipped to an image of `size`; those without area are left out."""
    height, width = size
    limits = found.boxes.new_tensor([width, height, width, height])
    clipped = found._replace(boxes=torch.minimum(found.boxes.clamp(min=0), limits))
    return take(clipped, (clipped.boxes[:, 2:] > clipped.boxes[:, :2]).all(dim=1))


def suppressed(found: Found) -> Found:
    """What suppression leaves, by falling score; of more than `MAX_CANDIDATES` boxes the best."""
    best = found.scores.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
    found = take(found, best)
    return take(found, suppress(found.boxes, found.scores, found.classes, MAX_OVERLAP))


def limit(found: Found, count: int) -> Found:
    """The best boxes."""
    return take(found, slice(count))


def take(found: Found, chosen: Tensor | slice) -> Found:
    """Some of the boxes, by a mask, indices or a slice."""
    return Found(found.boxes[chosen], found.scores[chosen], found.classes[chosen])


def trusted(found: Found, thresholds: Sequence[float]) -> Found:
    """The boxes with a score from their class's threshold on.

    Args:
        found: on the CPU.
        thresholds: of each class.
    """
    return take(found, found.scores >= torch.tensor(thresholds)[found.classes])


def concatenate(parts: Sequence[Found]) -> Found:
    """Boxes of several lists."""
    return Found(*map(torch.cat, zip(*parts)))
