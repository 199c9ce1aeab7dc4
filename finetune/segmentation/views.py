"""Scenes to samples: what part of an image and its mask a model sees, the two always in step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simmim.data import ImageSamples, Picture, open_picture
from simmim.data.decode import MAX_PIXELS, Size
from simmim.data.label_map_files import read_label_map
from simmim.data.label_maps import ClassScheme

TRIES = 10  # crops drawn in search of one that is not nearly all of one class, as published


def scaled_size(size: Size, short_side: int, factor: float = 1.0) -> Size:
    """(height, width) to which an image of `size`, (height, width), is brought: its shorter side `short_side` pixels long,
    or as it is for 0, times `factor`."""
    height, width = size
    factor = factor * (short_side / min(size) if short_side else 1.0)
    return max(1, round(height * factor)), max(1, round(width * factor))


@dataclass(frozen=True)
class RandomScene:
    """Random scale, crop and flip. What a crop reaches over is filled with the mean color and ignored.

    Args:
        size: (height, width) of the result in pixels.
        short_side: as of `scaled_size`, before the random scale.
        scale: range of the random scale, drawn on a log scale.
        class_share: largest share of one class in a crop, after `TRIES` misses any.
        flip: probability of mirroring left and right.
        fill: a channel's value, 0 to 255, where there is no image.
        ignored: the mask's value there.
    """

    size: Size
    short_side: int
    scale: tuple[float, float]
    class_share: float
    flip: float
    fill: tuple[int, ...]
    ignored: int

    def __call__(self, picture: Picture, mask: np.ndarray, generator: random.Random) -> tuple[Tensor, Tensor]:
        """A view drawn from `generator`: (channels, height, width) uint8, and (height, width) of the mask's type.

        Args:
            mask: classes' numbers, (height, width) of the picture.
        """
        factor = math.exp(generator.uniform(*map(math.log, self.scale)))
        scaled = scaled_size(picture.size, self.short_side, factor)
        height, width = (min(side, whole) for side, whole in zip(self.size, scaled))
        for _ in range(TRIES):
            top, left = generator.randint(0, scaled[0] - height), generator.randint(0, scaled[1] - width)
            seen = nearest_crop(mask, scaled, (top, left), (height, width))
            if self.class_share == 1 or largest_share(seen, self.ignored) <= self.class_share:
                break
        down, across = picture.size[0] / scaled[0], picture.size[1] / scaled[1]
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        image = torch.tensor(self.fill, dtype=torch.uint8).view(-1, 1, 1).repeat(1, *self.size)
        image[:, :height, :width] = picture.crop(box, (height, width))
        labels = np.full(self.size, self.ignored, dtype=mask.dtype)
        labels[:height, :width] = seen
        mirrored = generator.random() < self.flip
        labels = torch.from_numpy(labels)
        return (image.flip(-1), labels.flip(-1)) if mirrored else (image, labels)


@dataclass(frozen=True)
class WholeScene:
    """The view for evaluation: the whole image at the scale of training, and its mask as it is.

    Args:
        short_side: as of `scaled_size`.
    """

    short_side: int

    def __call__(self, picture: Picture, mask: np.ndarray, generator: random.Random | None = None) -> tuple[Tensor, Tensor]:
        """(channels, scaled height, scaled width) uint8, and the mask at its own size; draws nothing."""
        return whole_picture(picture, self.short_side), torch.from_numpy(mask)


def whole_picture(picture: Picture, short_side: int) -> Tensor:
    """All of a picture at `scaled_size`: (channels, height, width) uint8."""
    height, width = picture.size
    return picture.crop((0, 0, width, height), scaled_size(picture.size, short_side))


def nearest_crop(mask: np.ndarray, scaled: Size, corner: Size, size: Size) -> np.ndarray:
    """A part of a mask as if it had been brought to `scaled` (height, width) first, every pixel the one nearest to its
    center.

    Args:
        corner: (top, left) of the part, in scaled pixels.
        size: (height, width) of the part.
    """
    rows, columns = (
        ((np.arange(count) + first + 0.5) * whole / side).astype(np.intp).clip(max=whole - 1)
        for count, first, whole, side in zip(size, corner, mask.shape, scaled)
    )
    return mask[rows[:, None], columns]


def largest_share(mask: np.ndarray, ignored: int) -> float:
    """Of the pixels that count, the share of the most frequent class; 1 where fewer than two classes are seen."""
    counts = np.bincount(mask.ravel())
    if ignored < len(counts):
        counts[ignored] = 0
    return counts.max() / counts.sum() if np.count_nonzero(counts) > 1 else 1.0


class SceneSamples(ImageSamples):
    """Samples of scenes by (epoch, index): as of `ImageSamples`, with `mask`, (height, width) classes' numbers.

    Args:
        source: undecoded columns `image` and `mask`.
        view: `RandomScene` or `WholeScene`.
        scheme: the classes.
        keep_decoded: hold decoded images and masks in memory.
    """

    def __init__(
        self,
        source,
        view: Callable[[Picture, np.ndarray, random.Random], tuple[Tensor, Tensor]],
        scheme: ClassScheme,
        channels: int,
        seed: int,
        keep_decoded: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(source, view, channels, seed, keep_decoded, max_pixels)
        self.scheme = scheme

    def view_of(self, index: int, generator: random.Random) -> dict:
        """The view of the scene at `index`."""
        image, mask = self.view(*self.load(index), generator)
        return {"image": image, "label_map": mask}

    def load(self, index: int) -> tuple[Picture, np.ndarray]:
        """The image at `index`, and its mask as classes' numbers.

        Raises:
            One of `UNREADABLE`, also for a mask that does not fit, which was looked at before the run.
        """
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        row = self.source[index]
        picture = open_picture(row["image"], self.channels, self.max_pixels)
        mask = self.scheme.class_ids(read_label_map(row["label_map"]))
        if mask.shape != picture.size:
            raise ValueError(f"its label map has changed and is {mask.shape[0]}x{mask.shape[1]} pixels now (height x width)")
        if self.cache is not None:
            self.cache[index] = picture.decoded(), mask
            return self.cache[index]
        return picture, mask
