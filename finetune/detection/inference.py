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
from simmim.finetune.detection.soft_masks import SoftMask, draw_masks, predict_masks

MIN_PROBABILITY = 0.01  # of a class, below which a box is not kept
MAX_OVERLAP = 0.6  # of two boxes of one class, as in ATSS
MAX_CANDIDATES = 1000  # of a level before suppression, as published for 100 boxes
CANDIDATES_PER_BOX = 10  # where more are asked for: about ten points find each object
MAX_BOXES = 100  # of an image, as many as COCO's rules look at
MAX_COUNTED = 1000  # of an image, where objects are counted
EDGE_PX = 1.5  # a box that ends nearer to a tile's inner edge is taken to be cut there


class Found(NamedTuple):
    """The boxes found in one image, by falling score.

    Attributes:
        boxes: (N, 4) float32, (x1, y1, x2, y2) in pixels, inside the image.
        scores: (N,) float32, in [0, 1].
        classes: (N,) int64.
        masks: of each object; None from a detector of boxes alone.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: tuple[SoftMask, ...] | None = None

    def at(self, size: Size, own: Size) -> Found:
        """The same boxes in the image at its own size, and on the CPU.

        Args:
            size: of the image in which they were found.
        """
        across, down = own[1] / size[1], own[0] / size[0]
        boxes = self.boxes.cpu() * torch.tensor([across, down, across, down])
        masks = None if self.masks is None else tuple(mask.scaled(down, across) for mask in self.masks)
        return Found(boxes, self.scores.cpu(), self.classes.cpu(), masks)

    def draw_masks(self, size: Size) -> Tensor:
        """The masks in the pixels of the image, (N, height, width) bool.

        Args:
            size: of the image in which they were found.

        Raises:
            ValueError: from a detector of boxes alone.
        """
        if self.masks is None:
            raise ValueError("there are no masks: the detector was trained on boxes alone")
        return draw_masks(self.masks, size)


class Candidates(NamedTuple):
    """Boxes of one pass before their masks are computed, and the points that found them.

    Attributes:
        points: (N,), numbers of points.
    """

    found: Found
    points: Tensor

    def take(self, chosen: Tensor) -> Candidates:
        """Some of them, by a mask or indices."""
        return Candidates(take(self.found, chosen), self.points[chosen])


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
        predictions = model(padded)
        most = most_candidates(max_boxes)
        best = [one.take(suppression(one.found, most)[:max_boxes]) for one in candidates(predictions, size, most)]
        return [with_masks(one, predictions, row) for row, one in enumerate(best)]
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
    most = most_candidates(max_boxes)
    for group, views in windows_of(images, window):
        predictions = model(views)
        for number, one in enumerate(candidates(predictions, window, most)):
            (top, left), row = group[number // len(images)], number % len(images)
            one = one.take(suppression(one.found, most)[:MAX_CANDIDATES])
            one = one.take(~is_cut(one.found.boxes, (top, left), window, size))
            found = with_masks(one, predictions, number)
            moved = found.boxes + found.boxes.new_tensor([left, top, left, top])
            masks = found.masks and tuple(mask.moved((top, left)) for mask in found.masks)
            found = found._replace(boxes=clip_boxes(moved, size), masks=masks)
            merged[row].append(take(found, has_area(found.boxes)))
    whole = [concatenate(parts) for parts in merged]
    return [take(one, suppression(one, most)[:max_boxes]) for one in whole]


def with_masks(one: Candidates, predictions: Predictions, row: int) -> Found:
    """The boxes with the masks of their points, if the detector predicts masks.

    Args:
        row: of the image in `predictions`.
    """
    if predictions.mask_features is None:
        return one.found
    return one.found._replace(masks=predict_masks(predictions, row, one.points, one.found.boxes))


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


def most_candidates(max_boxes: int) -> int:
    """How many boxes of a level are looked at in search of `max_boxes`."""
    return max(MAX_CANDIDATES, CANDIDATES_PER_BOX * max_boxes)


def candidates(predictions: Predictions, size: Size, most: int = MAX_CANDIDATES) -> list[Candidates]:
    """Boxes of each image before suppression, clipped to `size`: of each level the best by class probability; their score is
    the geometric mean of class probability and centerness, as in FCOS's implementation.

    Args:
        size: of the image without its padding.
        most: of a level.
    """
    probabilities, centerness = predictions.logits.sigmoid(), predictions.centerness.sigmoid()
    boxes = predictions.boxes()
    results = []
    for row in range(len(probabilities)):
        parts, numbers, first = [], [], 0
        for height, width in predictions.sizes:
            level = slice(first, first + height * width)
            of_level = probabilities[row, level]
            scores, order = of_level.flatten().topk(min(most, of_level.numel()))
            order = order[scores > MIN_PROBABILITY]
            points, classes = order // of_level.shape[1], order % of_level.shape[1]
            score = (of_level[points, classes] * centerness[row, level][points]).sqrt()
            parts.append(Found(clip_boxes(boxes[row, level][points], size), score, classes))
            numbers.append(first + points)
            first += height * width
        found = Candidates(concatenate(parts), torch.cat(numbers))
        results.append(found.take(has_area(found.found.boxes)))
    return results


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Boxes clipped to an image of `size`."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def has_area(boxes: Tensor) -> Tensor:
    """Whether each box has an area, (N,) bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def suppression(found: Found, most: int = MAX_CANDIDATES) -> Tensor:
    """Indices of the boxes that suppression leaves, by falling score; of more than `most` boxes the best."""
    best = found.scores.argsort(descending=True, stable=True)[:most]
    return best[suppress(found.boxes[best], found.scores[best], found.classes[best], MAX_OVERLAP)]


def take(found: Found, chosen: Tensor) -> Found:
    """Some of the boxes, by a mask or indices."""
    masks = found.masks
    if masks is not None:
        numbers = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
        masks = tuple(masks[number] for number in numbers.tolist())
    return Found(found.boxes[chosen], found.scores[chosen], found.classes[chosen], masks)


def trusted(found: Found, thresholds: Sequence[float]) -> Found:
    """The boxes with a score from their class's threshold on; arguments as of `is_trusted`."""
    return take(found, is_trusted(found, thresholds))


def is_trusted(found: Found, thresholds: Sequence[float]) -> Tensor:
    """Whether each box has a score from its class's threshold on, (N,) bool.

    Args:
        found: on the CPU.
        thresholds: of each class.
    """
    return found.scores >= torch.tensor(thresholds)[found.classes]


def best_or_trusted(found: Found, thresholds: Sequence[float]) -> Found:
    """As many boxes as COCO's rules look at, and those of the others that are trusted: they are counted. Arguments as of
    `is_trusted`."""
    return take(found, (torch.arange(len(found.boxes)) < MAX_BOXES) | is_trusted(found, thresholds))


def concatenate(parts: Sequence[Found]) -> Found:
    """Boxes of several lists."""
    boxes, scores, classes = (torch.cat(values) for values in list(zip(*parts))[:3])
    masks = None if parts[0].masks is None else tuple(mask for one in parts for mask in one.masks or ())
    return Found(boxes, scores, classes, masks)
