"""Views of labeled images: the part of an image that a model sees, and the objects in it. Sizes are (height, width)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simmim.data import Picture
from simmim.data.decode import MAX_PIXELS, STRETCHED
from simmim.finetune.dense.views import (
    MAX_CROPS,
    TargetSamples,
    draw_scaled_size,
    nearest_pixels,
    padded_crop,
    whole_picture,
)
from simmim.finetune.dense.windows import Size
from simmim.finetune.detection.labels.scenes import Objects
from simmim.finetune.detection.masks import PackedMask, sample
from simmim.reading import Reading

MIN_VISIBLE = 0.3  # share of a box below which what a crop shows of its object is no example of it


class Targets(NamedTuple):
    """The objects of one view.

    Attributes:
        boxes: (N, 4) float32, (x1, y1, x2, y2) in the view's pixels, exclusive.
        classes: (N,) int64.
        ignored: (N,) bool, True = neither an object to find nor background.
        masks: (N, H, W) uint8, how much of each cell of the view an object covers, 0 to 255; None where boxes alone are
            learned, and for a whole image, whose masks stay as they are labeled.
    """

    boxes: Tensor
    classes: Tensor
    ignored: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class RandomBoxes:
    """Random scale, crop and flip. Where a crop exceeds the image, it has the mean color.

    Args:
        size: of the view in pixels.
        short_side: as of `scaled_size`, before the random scale.
        scale: range of the random scale, drawn on a log scale.
        flip: probability of mirroring left and right.
        fill: value of each channel outside the image, 0 to 255.
        mask_stride: side of the cells of masks, in pixels.
    """

    size: Size
    short_side: int
    scale: tuple[float, float]
    flip: float
    fill: tuple[int, ...]
    mask_stride: int = 1

    def __call__(self, picture: Picture, objects: Objects, generator: random.Random) -> tuple[Tensor, Targets]:
        """A view drawn from `generator`: (channels, height, width), uint8 or float32, and what it shows of the objects."""
        scaled = draw_scaled_size(picture.size, self.short_side, self.scale, generator)
        boxes = rescale(objects.boxes, picture.size, scaled)
        height, width = (min(side, scaled_side) for side, scaled_side in zip(self.size, scaled))
        for _ in range(MAX_CROPS):
            top, left = generator.randint(0, scaled[0] - height), generator.randint(0, scaled[1] - width)
            targets = crop_objects(objects, boxes, (top, left), (height, width))
            if (~targets.ignored).any() or objects.ignored.all():
                break
        image = padded_crop(picture, scaled, (top, left), (height, width), self.size, self.fill)
        mirrored = generator.random() < self.flip
        if objects.masks is not None:
            shown = visible(clip_boxes(boxes, (top, left), (height, width))).nonzero()[:, 0].tolist()
            rows = shown_pixels(height, top, picture.size[0], scaled[0], self.size[0])
            columns = shown_pixels(width, left, picture.size[1], scaled[1], self.size[1])
            columns = columns[::-1] if mirrored else columns
            targets = targets._replace(
                masks=sample_masks([objects.masks[number] for number in shown], rows, columns, self.mask_stride)
            )
        if mirrored:
            return image.flip(-1), targets._replace(boxes=mirror(targets.boxes, self.size[1]))
        return image, targets


@dataclass(frozen=True)
class WholeImage:
    """The view for evaluation: the whole image at the scale of training, and its objects at the image's own size.

    Args:
        short_side: as of `scaled_size`.
    """

    short_side: int

    def __call__(self, picture: Picture, objects: Objects, generator: random.Random | None = None) -> tuple[Tensor, Targets]:
        """(channels, scaled height, scaled width), uint8 or float32, and all objects. Draws nothing."""
        return whole_picture(picture, self.short_side), Targets(*map(torch.from_numpy, objects[:3]))


def rescale(boxes: np.ndarray, size: Size, scaled: Size) -> np.ndarray:
    """Boxes of an image of `size`, (N, 4), in the image resized to `scaled`."""
    down, across = scaled[0] / size[0], scaled[1] / size[1]
    return boxes * np.array([across, down, across, down], dtype=np.float32)


def crop_objects(objects: Objects, boxes: np.ndarray, corner: tuple[int, int], size: Size) -> Targets:
    """What a part of an image shows of its objects. Of those of which less than `MIN_VISIBLE` is shown, the part is ignored.

    Args:
        boxes: of the objects, in the image's pixels.
        corner: (top, left) of the part.
        size: of the part.
    """
    clipped, whole = clip_boxes(boxes, corner, size), torch.from_numpy(boxes)
    share = (clipped[:, 2:] - clipped[:, :2]).prod(dim=1) / (whole[:, 2:] - whole[:, :2]).prod(dim=1)
    shown = visible(clipped)
    ignored = torch.from_numpy(objects.ignored) | (share < MIN_VISIBLE)
    return Targets(clipped[shown], torch.from_numpy(objects.classes)[shown], ignored[shown])


def shown_pixels(count: int, first: int, side: int, scaled_side: int, view_side: int) -> np.ndarray:
    """The pixel of the image that each row or column of a view shows, (view_side,); −1 outside the image.

    Args:
        count: rows or columns of the view that show the image.
        first, side, scaled_side: as of `nearest_pixels`.
    """
    pixels = np.full(view_side, -1, dtype=np.intp)
    pixels[:count] = nearest_pixels(count, first, side, scaled_side)
    return pixels


def sample_masks(masks: Sequence[PackedMask], rows: np.ndarray, columns: np.ndarray, stride: int) -> Tensor:
    """As `Targets.masks`; arguments as of `sample`."""
    views = [sample(mask, rows, columns, stride) for mask in masks]
    if not views:
        return torch.zeros(0, -(-len(rows) // stride), -(-len(columns) // stride), dtype=torch.uint8)
    return torch.from_numpy(np.stack(views))


def clip_boxes(boxes: np.ndarray, corner: tuple[int, int], size: Size) -> Tensor:
    """Boxes in the pixels of a part of their image, without what reaches out of it; arguments as of `crop_objects`."""
    top, left = corner
    height, width = size
    moved = torch.from_numpy(boxes - np.array([left, top, left, top], dtype=np.float32))
    return torch.stack([moved[:, 0::2].clamp(0, width), moved[:, 1::2].clamp(0, height)], dim=-1).flatten(1)


def visible(boxes: Tensor) -> Tensor:
    """Whether each box has an area, (N,) bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def mirror(boxes: Tensor, width: int) -> Tensor:
    """Boxes, (N, 4), of an image of `width` pixels mirrored left and right."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


class BoxSamples(TargetSamples):
    """Samples of images with objects by (epoch, index): as of `TargetSamples`, with `objects`, a `Targets`, `row`, the index
    of the image in the source, and `own_size`, (height, width) of the image itself.

    Args:
        source: undecoded column `image`.
        objects: of each row.
        view: `RandomBoxes` or `WholeImage`.
        channels, seed, max_pixels, reading: as of `ImageSamples`.
        keep_decoded: hold decoded images in memory.
    """

    def __init__(
        self,
        source,
        objects: Sequence[Objects],
        view: Callable[[Picture, Objects, random.Random], tuple[Tensor, Targets]],
        channels: int,
        seed: int,
        keep_decoded: bool = False,
        max_pixels: int = MAX_PIXELS,
        reading: Reading = STRETCHED,
    ) -> None:
        super().__init__(source, view, channels, seed, keep_decoded, max_pixels, reading)  # type: ignore[arg-type]
        self.objects = objects

    def labels_of(self, row: dict, index: int, picture: Picture) -> Objects:
        """The objects, which lie in the image as it was when they were read."""
        boxes = self.objects[index].boxes
        if len(boxes) and (boxes[:, 2].max() > picture.size[1] or boxes[:, 3].max() > picture.size[0]):
            height, width = picture.size
            raise ValueError(f"the image has changed and is {height}x{width} pixels now (height x width)")
        return self.objects[index]

    def target_of(self, index: int, picture: Picture, target: Targets) -> dict:
        """The view of the objects, which image it is of, and the masks of a whole image's objects as they are labeled."""
        masks = self.objects[index].masks
        labeled = {"masks": masks} if masks is not None and target.masks is None else {}
        return {"objects": target, "row": index, "own_size": picture.size, **labeled}
