"""Views of labeled images: their scale, crops that may exceed them, and samples with targets. Sizes are (height, width)."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import ImageSamples, Picture, open_picture
from simmim.finetune.dense.windows import Size

MAX_CROPS = 10  # drawn in search of one that teaches something, as published for segmentation
VALIDATION_PIXELS = 2**18  # per validation batch, where all images have one size
MAX_VALIDATION_IMAGES = 64


def scaled_size(size: Size, short_side: int, factor: float = 1.0) -> Size:
    """The size of a resized image.

    Args:
        size: of the image.
        short_side: pixels to which the shorter side is resized; 0 keeps the image's own.
        factor: by which both sides are multiplied in addition.
    """
    height, width = size
    factor = factor * (short_side / min(size) if short_side else 1.0)
    return max(1, round(height * factor)), max(1, round(width * factor))


def draw_scaled_size(size: Size, short_side: int, scale: tuple[float, float], generator: random.Random) -> Size:
    """As `scaled_size`, by a factor drawn on a log scale from the range `scale`."""
    return scaled_size(size, short_side, math.exp(generator.uniform(*map(math.log, scale))))


def whole_picture(picture: Picture, short_side: int) -> Tensor:
    """A whole picture resized to `scaled_size`: (channels, height, width), uint8 or float32."""
    height, width = picture.size
    return picture.crop((0, 0, width, height), scaled_size(picture.size, short_side))


def padded_crop(picture: Picture, scaled: Size, corner: Size, crop: Size, size: Size, fill: tuple[int, ...]) -> Tensor:
    """A part of a picture that is resized to `scaled`, with `fill` to its right and below: (channels, *size), uint8 or
    float32, where no data stands for the fill.

    Args:
        corner, crop: (top, left) and size of the part, in pixels of the resized picture.
        size: of the view, not smaller than the part.
        fill: value of each channel outside the picture, 0 to 255.
    """
    (top, left), (height, width) = corner, crop
    down, across = picture.size[0] / scaled[0], picture.size[1] / scaled[1]
    part = picture.crop((left * across, top * down, (left + width) * across, (top + height) * down), crop)
    color = torch.tensor(fill, dtype=torch.uint8)
    if part.is_floating_point():
        color = torch.full_like(color, torch.nan, dtype=part.dtype)  # no data, which becomes the mean
    image = color.view(-1, 1, 1).repeat(1, *size)
    image[:, :height, :width] = part
    return image


def nearest_pixels(count: int, first: int, side: int, scaled_side: int) -> np.ndarray:
    """For `count` pixels of a resized image from `first` on, the pixel of the image that is nearest to the center of each.

    Args:
        side, scaled_side: of the image, and of the resized one.
    """
    return ((np.arange(count) + first + 0.5) * side / scaled_side).astype(np.intp).clip(max=side - 1)


def mean_color(preprocessing: Preprocessing) -> tuple[int, ...]:
    """The mean of each channel, 0 to 255, which fills a view outside its image."""
    return tuple(round(255 * mean) for mean in preprocessing.mean)


def validation_batch_size(sizes: Iterable[Size | None], short_side: int, targets_have_pixels: bool) -> int:
    """Validation images per batch: 1 unless all can be stacked.

    Args:
        sizes: of the images; None where it is not known.
        short_side: as of `scaled_size`.
        targets_have_pixels: targets are stacked too, at the images' own sizes.
    """
    own = set(sizes)
    scaled = {None if size is None else scaled_size(size, short_side) for size in own}
    stacked = scaled | own if targets_have_pixels else scaled
    if None in stacked or len(scaled) > 1 or (targets_have_pixels and len(own) > 1):
        return 1
    pixels = max(math.prod(size) for size in stacked if size)
    return min(max(1, VALIDATION_PIXELS // pixels), MAX_VALIDATION_IMAGES)


class TargetSamples(ImageSamples):
    """Samples with targets by (epoch, index): as of `ImageSamples`, with what `target_of` says. A view turns a picture and
    its labels into an image and a target.

    Images and labels are held in memory where those of `ImageSamples` are.
    """

    view: Callable[[Picture, Any, random.Random], tuple[Tensor, Any]]  # type: ignore[assignment]
    cache: dict[int, tuple[Picture, Any]] | None  # type: ignore[assignment]

    @abstractmethod
    def labels_of(self, row: dict, index: int, picture: Picture) -> Any:
        """The labels of a picture, for the view.

        Raises:
            ValueError: where the image or the labels have changed so that they do not fit. Sizes are checked before a run.
        """

    @abstractmethod
    def target_of(self, index: int, picture: Picture, target: Any) -> dict:
        """What the sample says beside its image."""

    def view_of(self, index: int, generator: random.Random) -> dict:
        """The view of the image at `index`."""
        picture, labels = self.load(index)
        image, target = self.view(picture, labels, generator)
        gray_copies = [self.name_of(index)] if picture.loses_color else []
        return {"image": image, **self.target_of(index, picture, target), "gray_copies": gray_copies}

    def load(self, index: int) -> tuple[Picture, Any]:
        """The image at `index`, and its labels.

        Raises:
            One of `UNREADABLE`, also for labels that do not fit any more.
        """
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        row = self.source[index]
        picture = open_picture(row["image"], self.channels, self.max_pixels, self.reading)
        labels = self.labels_of(row, index, picture)
        if self.cache is not None:
            self.cache[index] = picture.decoded(), labels
            return self.cache[index]
        return picture, labels
